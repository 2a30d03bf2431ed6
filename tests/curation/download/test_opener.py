"""What may be fetched, and how long and how much: at every hop, by real servers on real sockets."""

import gzip
import os
import select
import socket
import ssl
import subprocess
import threading
import time
import urllib.request
from contextlib import contextmanager, suppress

import pytest
from servers import LIMIT, body, serving

from vtp.curation.download.opener import MAX_URL, FetchError, GuardedOpener, plain_url, robots_directives
from vtp.curation.download.policy import Policy

LOOPBACK = Policy(timeout=60.0, deadline=60.0, max_bytes=LIMIT, allowed_networks=["127.0.0.1/32"], allowed_ports=None)
# One short limit each: on a busy machine too, no other limit comes first.
HASTY = LOOPBACK.model_copy(update={"timeout": 2.0})
STRICT = LOOPBACK.model_copy(update={"deadline": 2.0})
SOON = 15  # seconds; the slow answers of the server take longer
PICTURE = b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\n\xff\xd8\xff\xe0"
CHUNKED = b"Transfer-Encoding: chunked"


@pytest.fixture(scope="module")
def server():
    with serving() as server:
        yield server


@pytest.fixture(scope="module")
def opener():
    return GuardedOpener(LOOPBACK)


def ask(opener, url):
    """The bytes that come, or the message of the error."""
    try:
        with opener.open(urllib.request.Request(url, headers={"User-Agent": "tester"})) as answer:
            return answer.read()
    except FetchError as error:
        return str(error)


@contextmanager
def trap(host):
    """A socket that nobody should connect to; its port."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as listener:
        try:
            listener.bind((host, 0))
        except OSError:
            pytest.skip(f"this machine has no {host}")
        listener.listen()
        port = listener.getsockname()[1]
        yield port
        assert not select.select([listener], [], [], 0)[0], "somebody connected"
        with socket.create_connection((host, port)):
            assert select.select([listener], [], [], 10)[0], "the trap does not notice"


@contextmanager
def replying(*pieces, pause=0.0, host="127.0.0.1"):
    """A server that sends these bytes to the first who connects; its port, and what it was asked."""
    questions = []

    def serve():
        connection, _ = listener.accept()
        with connection, suppress(OSError):
            questions.append(connection.recv(65_536))
            for piece in pieces:
                connection.sendall(piece)
                time.sleep(pause)

    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as listener:
        listener.bind((host, 0))
        listener.listen()
        threading.Thread(target=serve, daemon=True).start()
        yield listener.getsockname()[1], questions


def test_a_picture_arrives_whole_with_what_matters_of_its_headers(opener, server):
    assert ask(opener, server.url("jpeg", 3)) == ask(opener, server.url("moved", 3)) == body("jpeg", 3)
    assert ask(opener, server.url("chunked")) == body("jpeg", 1)
    with opener.open(urllib.request.Request(server.url("noai", 1))) as answer:
        assert answer.headers.get_all("X-Robots-Tag") == ["NoAI"]
    for n in range(4):
        assert ask(opener, server.url("robots", n)) == body("jpeg", 1)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("missing", "http 404"),
        ("impostor", "http 403"),  # whatever else a server says of its status
        ("half", "truncated body"),
        ("half_chunked", "truncated body: IncompleteRead"),
        ("garbage", "bad gateway: BadStatusLine"),
        ("headers", "bad gateway: HTTPException"),
        ("big", "too large"),
        ("big_chunked", "too large"),
        ("endless", "too large"),
        ("loop", "redirect loop"),
    ],
)
def test_what_is_no_picture_is_an_error_with_a_cause(opener, server, kind, message):
    assert ask(opener, server.url(kind)) == message


ODD = {
    "plain": (PICTURE, b"\xff\xd8\xff\xe0"),
    "hints": (b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Hints\r\nLink: </a>\r\n\r\n" + PICTURE, b"\xff\xd8\xff\xe0"),
    "no length": (b"HTTP/1.0 200 OK\r\n\r\n\xff\xd8", b"\xff\xd8"),
    "less": (PICTURE.replace(b": 4", b": 3"), b"\xff\xd8\xff"),
    "more": (PICTURE.replace(b": 4", b": 5"), "truncated body"),
    "much more": (PICTURE.replace(b": 4", b": 99999999999999"), "too large"),
    "no chunks": (PICTURE.replace(b"Content-Length: 4", CHUNKED), "truncated body: IncompleteRead"),
    "long line": (b"HTTP/1.1 200 OK\r\nX-Long: " + b"x" * 100_000, "bad gateway: LineTooLong"),
    "half a status": (b"HTTP/1.1 20", "bad gateway: BadStatusLine"),
    "nowhere": (b"HTTP/1.1 302 Found\r\n\r\n", "http 302"),
    "bracket": (b"HTTP/1.1 302 Found\r\nLocation: http://[::1/\r\n\r\n", "bad url: of a redirect"),
    "port": (b"HTTP/1.1 302 Found\r\nLocation: http://a:99999/\r\n\r\n", "bad url"),
    "long url": (b"HTTP/1.1 302 Found\r\nLocation: /" + b"x" * MAX_URL + b"\r\n\r\n", "bad url: too long"),
}


@pytest.mark.parametrize("name", ODD)
def test_odd_answers(opener, name):
    reply, expected = ODD[name]
    with replying(reply) as (port, _):
        assert ask(opener, f"http://127.0.0.1:{port}/") == expected


def test_what_is_compressed_stays_so(opener):
    """A bomb of a megabyte that would be a gigabyte is neither asked for nor inflated."""
    bomb = gzip.compress(bytes(10_000_000))
    head = b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nContent-Length: %d\r\n\r\n" % len(bomb)
    with replying(head + bomb) as (port, questions):
        assert ask(opener, f"http://127.0.0.1:{port}/") == bomb
    assert b"Accept-Encoding: identity" in questions[0]


def test_a_question_has_neither_names_nor_passwords(opener):
    with replying(PICTURE) as (port, questions):
        assert ask(opener, f"http://somebody:secret@127.0.0.1:{port}/a%20b?c=d#e") == b"\xff\xd8\xff\xe0"
    lines = questions[0].decode().split("\r\n")
    assert lines[0] == "GET /a%20b?c=d HTTP/1.1"
    assert sorted(lines[1:-2]) == [
        "Accept-Encoding: identity",
        "Accept: image/*,*/*;q=0.8",
        "Connection: close",
        f"Host: 127.0.0.1:{port}",
        "User-Agent: tester",
    ]


def test_addresses_of_six_parts_are_asked_too():
    if not socket.has_ipv6 or not os.path.exists("/proc/net/if_inet6"):
        pytest.skip("this machine has no IPv6")
    opener = GuardedOpener(LOOPBACK.model_copy(update={"allowed_networks": ["::1/128"]}))
    with replying(PICTURE, host="::1") as (port, questions):
        assert ask(opener, f"http://[::1]:{port}/") == b"\xff\xd8\xff\xe0"
    assert f"Host: [::1]:{port}".encode() in questions[0]


@pytest.mark.parametrize(
    ("policy", "kinds", "message"),
    [
        (HASTY, ("stalled", "stalled_body"), "time out"),
        (STRICT, ("drip", "drip_head", "stalled", "stalled_body", "relay"), "deadline"),
    ],
)
def test_slow_answers_are_given_up(server, policy, kinds, message):
    opener = GuardedOpener(policy)
    for kind in kinds:
        start = time.monotonic()
        assert ask(opener, server.url(kind)) == message
        assert time.monotonic() - start < SOON


@pytest.mark.parametrize(
    "pieces",
    [
        pytest.param([b"HTTP/1.1 200 OK\r\n", *[b"X-More: more\r\n"] * 100], id="headers"),
        pytest.param([b"HTTP/1.1 103 Early Hints\r\n\r\n"] * 100, id="hints"),
        pytest.param([b"HTTP/1.0 200 OK\r\n\r\n", *[b"\xff"] * 100], id="a body without end"),
        pytest.param([PICTURE.replace(b"Content-Length: 4", CHUNKED)[:-4], *[b"0"] * 100], id="size"),
    ],
)
def test_drops_end_at_the_deadline_wherever_they_fall(pieces):
    """Each comes well within the time of one operation, and what has come so far is no picture."""
    with replying(*pieces, pause=0.3) as (port, _):
        start = time.monotonic()
        assert ask(GuardedOpener(STRICT), f"http://127.0.0.1:{port}/") == "deadline"
        assert time.monotonic() - start < SOON


def test_a_handshake_that_drips_ends_at_the_deadline():
    with replying(b"\x16\x03\x03\x40\x00", *[b"\x02"] * 100, pause=0.3) as (port, _):
        start = time.monotonic()
        assert ask(GuardedOpener(STRICT), f"https://127.0.0.1:{port}/") == "deadline"
        assert time.monotonic() - start < SOON


def test_a_name_server_that_does_not_answer_is_not_waited_for(monkeypatch):
    over = threading.Event()
    monkeypatch.setattr(socket, "getaddrinfo", lambda *arguments, **more: over.wait(60))
    assert ask(GuardedOpener(HASTY), "http://slow.example/") == "time out"
    assert ask(GuardedOpener(STRICT), "http://slow.example/") == "deadline"
    over.set()


def test_no_connection_stays_open(opener, server):
    """Nor does what the watchdog holds of it."""

    def connections():
        links = []
        for number in os.listdir("/proc/self/fd"):
            with suppress(OSError):  # the one that the listing itself had
                links.append(os.readlink(f"/proc/self/fd/{number}"))
        return sum(link.startswith("socket:") for link in links)

    ask(opener, server.url("jpeg"))
    before = connections()
    for kind in ("jpeg", "half", "big", "loop", "garbage"):
        ask(opener, server.url(kind))
    assert connections() <= before + 1  # the server's end of the last may take a moment


@pytest.mark.parametrize("host", ["127.0.0.2", "::1", "2130706434", "[::ffff:127.0.0.2]", "0.0.0.0"])
def test_addresses_outside_are_refused_and_never_connected(opener, server, host):
    bound = {"2130706434": "127.0.0.2", "[::ffff:127.0.0.2]": "127.0.0.2"}.get(host, host)
    with trap(bound) as port:
        where = f"http://{f'[{host}]' if host == '::1' else host}:{port}/"
        said = {ask(opener, where)}
        server.away = [where]
        said |= {ask(opener, server.url("away")), ask(opener, server.url("twice_away"))}
        assert said == {"address refused"}


@pytest.mark.parametrize("where", ["http://10.0.0.1/", "http://169.254.169.254/latest/meta-data/", "http://[fe80::1]/"])
def test_private_addresses_are_refused_after_a_redirect_too(opener, server, where):
    server.away = [where]
    assert ask(opener, where) == ask(opener, server.url("away")) == "address refused"


def test_names_are_refused_by_where_they_lead(server):
    strict = GuardedOpener(LOOPBACK.model_copy(update={"allowed_networks": []}))
    assert ask(strict, f"http://localhost:{server.server_port}/jpeg/0") == "address refused"
    assert ask(strict, "http://no.such.name.invalid/") == "host not found"
    assert ask(strict, f"http://{'a' * 64}.example/") == "host not found"  # longer than a label may be


def naming(monkeypatch, *answers):
    """Have a name resolve to these addresses, one list after the other; numbers resolve as ever."""
    plain, asked = socket.getaddrinfo, []

    def resolve(host, *arguments, **more):
        if host != "turning.example":
            return plain(host, *arguments, **more)
        asked.append(host)
        addresses = answers[min(len(asked), len(answers)) - 1]
        return [entry for address in addresses for entry in plain(address, *arguments, **more)]

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    return asked


def test_a_name_that_turns_is_connected_where_it_was_checked(opener, server, monkeypatch):
    asked = naming(monkeypatch, ["127.0.0.1"], ["127.0.0.2"])
    assert ask(opener, f"http://turning.example:{server.server_port}/jpeg/2") == body("jpeg", 2)
    assert asked == ["turning.example"]
    assert ask(opener, f"http://turning.example:{server.server_port}/jpeg/2") == "address refused"


def test_a_name_with_one_address_outside_is_refused(opener, server, monkeypatch):
    naming(monkeypatch, ["127.0.0.1", "10.0.0.1"])
    assert ask(opener, f"http://turning.example:{server.server_port}/jpeg/2") == "address refused"


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("ftp://127.0.0.1/a", "scheme refused"),
        ("file:///etc/passwd", "scheme refused"),
        ("data:image/png;base64,iVBORw0KGgo=", "scheme refused"),
        ("http://127.0.0.1:99999/", "bad url"),
        ("http://127.0.0.1:0/", "bad url"),
        ("http:///a", "bad url"),
        ("http://127.0.0.1/" + "b" * MAX_URL, "bad url: too long"),
        ("http://127.0.0.1:9/", "no connection"),
    ],
)
def test_what_cannot_be_asked_for(opener, server, url, message):
    assert ask(opener, url) == message
    server.away = [url]
    if message == "scheme refused":
        assert ask(opener, server.url("away")) == message


def test_ports_can_be_limited(server):
    opener = GuardedOpener(LOOPBACK.model_copy(update={"allowed_ports": [80, server.server_port]}))
    assert ask(opener, server.url("jpeg")) == body("jpeg", 0)
    server.away = ["http://127.0.0.1:22/"]
    assert ask(opener, "http://127.0.0.1:22/") == ask(opener, server.url("away")) == "port refused"


def test_https_is_verified_and_has_the_same_limits(tmp_path, monkeypatch):
    certificate, key = tmp_path / "certificate.pem", tmp_path / "key.pem"
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=127.0.0.1"]
    command += ["-addext", "subjectAltName=IP:127.0.0.1", "-keyout", str(key), "-out", str(certificate)]
    subprocess.run(command, check=True, capture_output=True)
    with serving() as server:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate, key)
        server.socket = context.wrap_socket(server.socket, server_side=True)

        def url(kind):
            return server.url(kind).replace("http:", "https:")

        assert ask(GuardedOpener(LOOPBACK), url("jpeg")) == "tls error: self-signed certificate"
        monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
        opener = GuardedOpener(LOOPBACK)
        assert ask(opener, url("jpeg")) == body("jpeg", 0)
        assert ask(opener, url("endless")) == "too large"
        assert ask(opener, url("half")) == "truncated body"
        assert "Hostname mismatch" in str(ask(opener, url("jpeg").replace("127.0.0.1", "localhost")))
        assert ask(GuardedOpener(STRICT), url("drip")) == "deadline"


@pytest.mark.parametrize(
    ("address", "allowed"),
    [
        ("93.184.216.34", True),
        ("2606:4700::1111", True),
        ("127.0.0.1", True),  # by the list
        ("127.0.0.2", False),
        ("::ffff:10.0.0.1", False),
        ("::ffff:93.184.216.34", True),
        ("64:ff9b::a00:1", False),
        ("64:ff9b:1::a00:1", False),
        ("::10.0.0.1", False),
        ("fec0::1", False),
        ("2002:a00:1::", False),
        ("fe80::1%eth0", False),
        ("fd00:ec2::254", False),
        ("100.64.0.1", False),
        ("224.0.0.1", False),
        ("255.255.255.255", False),
        ("0.0.0.0", False),
    ],
)
def test_public_addresses(address, allowed):
    assert LOOPBACK.allows_address(address) is allowed


@pytest.mark.parametrize(
    ("tag", "directives"),
    [
        ("noai", ["noai"]),
        ("NoAI, noimageai", ["NoAI", "noimageai"]),
        ("noai, max-snippet: 5", ["noai"]),
        ("unavailable_after: 25 Jun 2010 15:00:00 PST, noai", ["noai"]),
        ("unavailable_after: Friday, 25-Jun-10 15:00:00 PST, noai", ["25-Jun-10 15", "noai"]),
        ("otherbot: noai, nofollow", ["otherbot: noai", "otherbot: nofollow"]),
        ("otherbot: max-snippet: 5, noai", ["otherbot: noai"]),
        ("none, googlebot: noindex", ["none", "googlebot: noindex"]),
        ("otherbot: noai,", ["otherbot: noai"]),
        ("otherbot:", []),
        (": noai,,", ["noai"]),
    ],
)
def test_directives_for_robots_are_told_one_by_one(tag, directives):
    assert robots_directives(tag) == directives


@pytest.mark.parametrize(
    ("url", "plain"),
    [
        ("http://a/b?c=%20d#e", "http://a/b?c=%20d#e"),
        ("http://a/straße ü", "http://a/stra%C3%9Fe%20%C3%BC"),
        ("http://müller.de/ü", "http://xn--mller-kva.de/%C3%BC"),
        ("http://ü:ä@пример.рф:8080/", "http://%C3%BC:%C3%A4@xn--e1afmkfd.xn--p1ai:8080/"),
        (" http://a/b\n", "http://a/b"),
        ("http://a/b\r\nHost: c", "http://a/b%0D%0AHost:%20c"),
    ],
)
def test_urls_become_ascii(url, plain):
    assert plain_url(url) == plain
