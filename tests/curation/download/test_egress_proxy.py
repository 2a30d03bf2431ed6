"""The proxy: addresses, sizes and times, at every hop. A real proxy process, a real server, real sockets."""

import json
import os
import select
import socket
import ssl
import subprocess
import sys
import time
import urllib.error
import urllib.request
from contextlib import contextmanager

import pytest
from servers import LIMIT, body, serving
from tiny import ROOT

from vtp.config import ConfigError
from vtp.curation.download.egress_proxy import load_policy, robots_directives
from vtp.curation.download.policy import DEADLINE_HEADER, Policy

LOOPBACK = Policy(timeout=60.0, deadline=60.0, max_bytes=LIMIT, allowed_networks=["127.0.0.1/32"], allowed_ports=None)
# One short limit each: on a busy machine too, no other limit comes first.
HASTY = LOOPBACK.model_copy(update={"timeout": 2.0})
STRICT = LOOPBACK.model_copy(update={"deadline": 2.0})
SOON = 15  # seconds; the slow answers of the server take longer


@contextmanager
def guarding(folder, policy=LOOPBACK, **environment):
    """A proxy in its own process; its address."""
    path = folder / "proxy.json"
    path.write_text(json.dumps({"download": {"policy": policy.model_dump()}}))
    command = [sys.executable, "-m", "vtp.curation.download.egress_proxy", f"{path}:download", "--follow"]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, cwd=ROOT, env=os.environ | environment, **pipes) as process:
        try:
            yield process.stdout.readline().strip()
        finally:
            process.stdin.close()  # as when the stage dies
        assert process.wait(timeout=60) == 0


@pytest.fixture(scope="module")
def server():
    with serving() as server:
        yield server


@pytest.fixture(scope="module")
def proxy(tmp_path_factory):
    with guarding(tmp_path_factory.mktemp("proxy")) as address:
        yield address


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


def ask(proxy, url, **headers):
    """Status, reason or body of one request."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({"http": proxy}))
    try:
        with opener.open(urllib.request.Request(url, headers=headers), timeout=90) as answer:
            return answer.status, answer.read()
    except urllib.error.HTTPError as error:
        return error.code, error.reason


def test_a_picture_arrives_whole_with_what_matters_of_its_headers(proxy, server):
    assert ask(proxy, server.url("jpeg", 3)) == (200, body("jpeg", 3))
    assert ask(proxy, server.url("chunked")) == (200, body("jpeg", 1))
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({"http": proxy}))
    with opener.open(server.url("noai", 1)) as answer:
        assert answer.headers.get_all("X-Robots-Tag") == ["NoAI"]
        assert int(answer.headers["Content-Length"]) == len(body("jpeg", 1))
    for n in range(4):
        assert ask(proxy, server.url("robots", n)) == (200, body("jpeg", 1))


@pytest.mark.parametrize(
    ("kind", "status", "cause"),
    [
        ("missing", 404, "Not Found"),
        ("impostor", 403, "Forbidden"),  # a server cannot speak for the proxy
        ("half", 502, "proxy: truncated body"),
        ("half_chunked", 502, "proxy: truncated body"),
        ("garbage", 502, "proxy: bad gateway"),
        ("headers", 502, "proxy: bad gateway"),
        ("big", 502, "proxy: too large"),
        ("big_chunked", 502, "proxy: too large"),
        ("endless", 502, "proxy: too large"),
    ],
)
def test_what_is_no_picture_is_an_answer_with_a_cause(proxy, server, kind, status, cause):
    assert ask(proxy, server.url(kind)) == (status, cause)


@pytest.mark.parametrize(
    ("policy", "kinds", "cause"),
    [(HASTY, ("stalled", "stalled_body"), "proxy: time out"), (STRICT, ("drip", "drip_head"), "proxy: deadline")],
)
def test_slow_answers_are_given_up(tmp_path, server, policy, kinds, cause):
    with guarding(tmp_path, policy) as proxy:
        for kind in kinds:
            start = time.monotonic()
            assert ask(proxy, server.url(kind)) == (504, cause)
            assert time.monotonic() - start < SOON


def test_a_request_has_what_earlier_ones_of_its_attempt_left_of_the_deadline(proxy, server):
    start = time.monotonic()
    late = {DEADLINE_HEADER: str(time.time() + 0.5)}
    assert ask(proxy, server.url("drip"), **late) == (504, "proxy: deadline")
    assert time.monotonic() - start < SOON


@pytest.mark.parametrize("host", ["127.0.0.2", "::1", "2130706434", "[::ffff:127.0.0.2]", "0.0.0.0"])
def test_addresses_outside_are_refused_and_never_connected(proxy, server, host):
    bound = {"2130706434": "127.0.0.2", "[::ffff:127.0.0.2]": "127.0.0.2"}.get(host, host)
    with trap(bound) as port:
        where = f"http://{f'[{host}]' if host == '::1' else host}:{port}/"
        said = {ask(proxy, where)}
        server.away = [where]
        said |= {ask(proxy, server.url("away")), ask(proxy, server.url("twice_away"))}
        assert said == {(403, "proxy: address refused")}


@pytest.mark.parametrize("where", ["http://10.0.0.1/", "http://169.254.169.254/latest/meta-data/", "http://[fe80::1]/"])
def test_private_addresses_are_refused_after_a_redirect_too(proxy, server, where):
    server.away = [where]
    assert ask(proxy, where) == ask(proxy, server.url("away")) == (403, "proxy: address refused")


def test_only_http_and_https_are_asked_for(proxy, server):
    raw = raw_request(proxy, b"GET ftp://127.0.0.1/a HTTP/1.1\r\nHost: a\r\n\r\n")
    assert raw.startswith(b"HTTP/1.1 403 proxy: scheme refused")
    assert b" 403 proxy: scheme refused" in raw_request(proxy, b"GET file:///etc/passwd HTTP/1.1\r\nHost: a\r\n\r\n")
    server.away = ["file:///etc/passwd"]
    assert "Redirection to url 'file:///etc/passwd' is not allowed" in ask(proxy, server.url("away"))[1]
    tunnel = b"CONNECT 127.0.0.1:%d HTTP/1.1\r\nHost: a\r\n\r\n" % server.server_port
    assert b" 405 proxy: method refused" in raw_request(proxy, tunnel)
    assert b" 400 proxy: bad url" in raw_request(proxy, b"GET http://127.0.0.1:99999/ HTTP/1.1\r\nHost: a\r\n\r\n")
    assert raw_request(proxy, b"\r\n\0\0\0rubbish\r\n\r\n") == b""


def raw_request(proxy, request):
    host, port = proxy.split(":")
    with socket.create_connection((host, int(port)), timeout=90) as connection:
        connection.sendall(request)
        answer = b""
        while piece := connection.recv(4096):
            answer += piece
    return answer


def test_ports_can_be_limited(tmp_path, server):
    policy = LOOPBACK.model_copy(update={"allowed_ports": [80, server.server_port]})
    with guarding(tmp_path, policy) as proxy:
        assert ask(proxy, server.url("jpeg"))[0] == 200
        assert ask(proxy, "http://127.0.0.1:22/") == (403, "proxy: port refused")


def test_https_is_spoken_by_the_proxy(tmp_path):
    """Limits hold and causes are told for https as for http; a certificate of nobody is refused."""
    certificate, key = tmp_path / "certificate.pem", tmp_path / "key.pem"
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=127.0.0.1"]
    command += ["-addext", "subjectAltName=IP:127.0.0.1", "-keyout", str(key), "-out", str(certificate)]
    subprocess.run(command, check=True, capture_output=True)
    with serving() as server:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate, key)
        server.socket = context.wrap_socket(server.socket, server_side=True)

        def raw(proxy, kind):
            url = server.url(kind).replace("http:", "https:")
            return raw_request(proxy, f"GET {url} HTTP/1.1\r\nHost: a\r\n\r\n".encode())

        with guarding(tmp_path, SSL_CERT_FILE=str(certificate)) as proxy:
            assert raw(proxy, "jpeg").endswith(body("jpeg", 0))
            assert b"proxy: too large" in raw(proxy, "endless")
        with guarding(tmp_path, STRICT, SSL_CERT_FILE=str(certificate)) as proxy:
            assert b"proxy: deadline" in raw(proxy, "drip")
        with guarding(tmp_path) as proxy:
            assert b"proxy: tls error" in raw(proxy, "jpeg")


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


def test_a_policy_is_read_from_the_parameters(tmp_path):
    path = tmp_path / "params.yaml"
    path.write_text(json.dumps({"download": {"policy": LOOPBACK.model_dump(), "retries": 1}}))
    assert load_policy(f"{path}:download") == LOOPBACK
    overlay = tmp_path / "overlay.yaml"
    overlay.write_text(f"base: {path.name}\ndownload: {{policy: {{timeout: 7.0}}}}\n")
    assert load_policy(f"{overlay}:download") == LOOPBACK.model_copy(update={"timeout": 7.0})
    with pytest.raises(ConfigError, match="no section 'other' with a policy"):
        load_policy(f"{path}:other")
    path.write_text(json.dumps({"download": {"policy": LOOPBACK.model_dump() | {"allowed_networks": ["10.0.0.1/8"]}}}))
    with pytest.raises(ConfigError, match="has host bits set"):
        load_policy(f"{path}:download")
