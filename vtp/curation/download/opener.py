"""urllib's opener for URLs of strangers: it enforces a `Policy` where connections are made.

img2dataset asks `urllib.request.urlopen`, which asks the opener that is installed. This one answers with a picture's bytes,
whole and within the limits, or raises a `FetchError` that begins with the cause.

- Every host is resolved here, all of its addresses must be allowed, and the connection goes to the checked address
  itself, so a name that resolves differently a second later gains nothing. A redirect is checked like a row's URL.
- One deadline covers all of an attempt: names, redirects, TLS, and answers that drip, be it in their header.
- What is read of an answer is its status, `Location`, `X-Robots-Tag` and body. Compressed bodies are not asked for and
  stay as they are; user names and passwords in URLs are not sent.
"""

import io
import socket
import ssl
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from email.message import Message
from http.client import HTTPConnection, HTTPException, HTTPResponse, HTTPSConnection
from typing import NamedTuple
from urllib.parse import quote, urljoin, urlsplit, urlunsplit
from urllib.request import Request
from urllib.response import addinfourl

from vtp.curation.download.policy import SCHEMES, Policy
from vtp.curation.download.watchdog import Attempt, Watchdog

REDIRECTS = (301, 302, 303, 307, 308)
MOST_REDIRECTS = 10
MAX_URL = 16 << 10
CHUNK = 64 << 10
ADDRESSES_TRIED = 3
RESOLVERS = 64  # threads: a name server that does not answer holds one for many seconds
PRINTABLE = "!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~"
ROBOTS = "X-Robots-Tag"
# Directives with a value, which look like the name of a robot: `noai, max-snippet: 5`.
VALUED = ("max-snippet", "max-image-preview", "max-video-preview", "unavailable_after")


class FetchError(Exception):
    """There is no picture; the message is the cause in few words, and after a colon more of it."""


class Target(NamedTuple):
    """A URL as it is asked for."""

    tls: bool
    host: str
    port: int
    path: str


class GuardedOpener:
    """For `urllib.request.install_opener`; any number of threads may use it."""

    def __init__(self, policy: Policy) -> None:
        self._policy = policy
        self._watchdog = Watchdog()
        self._resolvers = ThreadPoolExecutor(RESOLVERS)
        self._tls = ssl.create_default_context()

    def open(self, request: Request, data: object = None, timeout: object = None) -> addinfourl:
        """The answer to a GET; data and timeout, which urllib hands over, are not looked at. Raises FetchError."""
        url, headers = request.full_url, {"User-Agent": request.get_header("User-agent", "")}
        headers |= {"Accept": "image/*,*/*;q=0.8", "Connection": "close"}
        with self._watchdog.attempt(self._policy.deadline) as attempt:
            try:
                answer = self._follow(url, headers, attempt)
                if attempt.left > 0:  # or it is what came before the connection was cut
                    return answer
            except TimeoutError:
                if attempt.left > 0:
                    raise FetchError("time out") from None
            except Exception:
                if attempt.left > 0:
                    raise
            raise FetchError("deadline")

    def _follow(self, url: str, headers: dict[str, str], attempt: Attempt) -> addinfourl:
        """The answer at the end of all redirects."""
        for _ in range(1 + MOST_REDIRECTS):
            status, head, body = self._get(self._checked(url), headers, attempt)
            location = head["Location"] if status in REDIRECTS else None
            if location is None:
                if not 200 <= status < 300:
                    raise FetchError(f"http {status}")
                return addinfourl(io.BytesIO(body), _told_one_by_one(head), url, status)
            try:
                url = urljoin(url, quote(location, safe=PRINTABLE, encoding="latin-1"))
            except ValueError:
                raise FetchError("bad url: of a redirect") from None
        raise FetchError("redirect loop")

    def _checked(self, url: str) -> Target:
        if len(url) > MAX_URL:
            raise FetchError("bad url: too long")
        try:
            parts = urlsplit(url)
            port = parts.port
        except ValueError:
            raise FetchError("bad url") from None
        if parts.scheme not in SCHEMES:
            raise FetchError("scheme refused")
        if not parts.hostname or port == 0:
            raise FetchError("bad url")
        tls = parts.scheme == "https"
        port = port or (443 if tls else 80)
        if not self._policy.allows_port(port):
            raise FetchError("port refused")
        return Target(tls, parts.hostname, port, (parts.path or "/") + (f"?{parts.query}" if parts.query else ""))

    def _get(self, target: Target, headers: dict[str, str], attempt: Attempt) -> tuple[int, Message, bytes]:
        """Status, header and, of a success, body."""
        host, port, cause = target.host, target.port, "no connection"
        try:
            with closing(
                HTTPSConnection(host, port, context=self._tls) if target.tls else HTTPConnection(host, port)
            ) as connection:
                connection.sock = self._connect(target, attempt)  # so it makes none itself
                cause = "bad gateway"
                connection.request("GET", target.path, headers=headers)
                with connection.getresponse() as response:
                    while 100 < response.status < 200:  # early hints; the answer is still to come
                        response.headers = None  # type: ignore[assignment] - or `begin` reads no other
                        response.begin()
                    if not 200 <= response.status < 300:  # whatever page comes along is no picture
                        return response.status, response.headers, b""
                    cause = "truncated body"
                    return response.status, response.headers, self._body(response)
        except TimeoutError:
            raise
        except (HTTPException, OSError, ValueError) as error:
            raise FetchError(f"{cause}: {type(error).__name__}") from None

    def _body(self, response: HTTPResponse) -> bytes:
        announced, body = response.length or 0, bytearray()
        while max(announced, len(body)) <= self._policy.max_bytes:
            piece = response.read(CHUNK)
            if not piece:
                if response.length:
                    raise FetchError("truncated body")
                return bytes(body)
            body += piece
        raise FetchError("too large")

    def _connect(self, target: Target, attempt: Attempt) -> socket.socket:
        """A connection to an address that was checked; the name is not resolved again."""
        for address in self._resolve(target, attempt)[:ADDRESSES_TRIED]:
            try:
                plain = socket.create_connection((address, target.port), self._soon(attempt))
            except TimeoutError:
                raise
            except OSError:
                continue
            attempt.hold(plain)
            plain.settimeout(self._policy.timeout)
            return self._encrypted(plain, target.host) if target.tls else plain
        raise FetchError("no connection")

    def _encrypted(self, plain: socket.socket, host: str) -> socket.socket:
        try:
            return self._tls.wrap_socket(plain, server_hostname=host)
        except TimeoutError:
            raise
        except (OSError, ValueError) as error:  # the latter for a name that no certificate can have
            reason = getattr(error, "verify_message", None) or type(error).__name__
            raise FetchError(f"tls error: {reason}") from None
        finally:
            plain.close()  # detached, unless there is an error

    def _resolve(self, target: Target, attempt: Attempt) -> list[str]:
        asked = self._resolvers.submit(socket.getaddrinfo, target.host, target.port, type=socket.SOCK_STREAM)
        try:
            found = asked.result(self._soon(attempt))
        except TimeoutError:
            asked.cancel()
            raise
        except (OSError, ValueError):
            raise FetchError("host not found") from None
        addresses = list(dict.fromkeys(str(entry[4][0]) for entry in found))
        # All of them: which one is tried must not decide.
        if not all(self._policy.allows_address(address) for address in addresses):
            raise FetchError("address refused")
        return addresses

    def _soon(self, attempt: Attempt) -> float:
        """Seconds that one operation may take. Raises TimeoutError when none are left."""
        if attempt.left <= 0:
            raise TimeoutError
        return min(self._policy.timeout, attempt.left)


def plain_url(url: str) -> str:
    """A URL in ASCII, which is all that HTTP takes: an international host name in Punycode, the rest quoted."""
    url = url.strip()
    if not url.isascii():
        try:
            parts = urlsplit(url)
            user, at, place = parts.netloc.rpartition("@")
            host, colon, port = place.partition(":")
            if not host.isascii():
                host = host.encode("idna").decode()
                url = urlunsplit(parts._replace(netloc=f"{user}{at}{host}{colon}{port}"))
        except ValueError:
            pass  # the opener will say so
    return quote(url, safe=PRINTABLE)


def _told_one_by_one(head: Message) -> Message:
    """A header with one directive for robots in each of its lines."""
    tags = head.get_all(ROBOTS, [])
    del head[ROBOTS]
    for directive in (each for tag in tags for each in robots_directives(tag)):
        head[ROBOTS] = directive
    return head


def robots_directives(tag: str) -> list[str]:
    """`X-Robots-Tag` as one directive each, after the robot that it is for, if it names one.

    img2dataset takes all before the first colon for a robot, so `noai, max-snippet: 5` would be no refusal to it.
    """
    robot, directives = "", []
    for part in tag.split(","):
        name, colon, rest = (piece.strip() for piece in part.partition(":"))
        if colon and name.lower() not in VALUED and " " not in name:  # in a date, a colon may follow a blank
            robot, name = name and f"{name}: ", rest
        if name and name.partition(":")[0].strip().lower() not in VALUED:
            directives.append(robot + name)
    return directives
