"""A forward proxy on loopback that stands between img2dataset and the network, and enforces a `Policy`.

    python -m vtp.curation.download.egress_proxy params.yaml:download --listen 127.0.0.1:3128

The stage `download` starts it by itself; on a cluster the command above runs it on every node. It fetches a body
whole, within the limits, and only then answers, with a correct length or with an error whose reason phrase tells the
cause: what img2dataset gets is complete, and what it reports is why not.

- Every host is resolved here, all of its addresses must be allowed, and the connection goes to the checked address
  itself, so a name that resolves differently a second later gains nothing. A redirect is a new request, and is checked
  again.
- `https` is asked for like `http`, by `GET https://...`: the proxy speaks TLS itself. A tunnel would hide sizes, slow
  drips and causes from it, so none is opened.
- What is passed on of an answer is its status, type, `Location` and `X-Robots-Tag`, one directive each; reason phrases
  are ours, so that no server can pretend to be the proxy.
"""

import argparse
import asyncio
import os
import resource
import ssl
import sys
import time
from collections.abc import Awaitable
from concurrent.futures import ThreadPoolExecutor
from http import HTTPStatus
from typing import NamedTuple, TypeVar
from urllib.parse import SplitResult, urlsplit

import h11

from vtp.config import ConfigError
from vtp.curation.download.policy import DEADLINE_HEADER, PREFIX, SCHEMES, Policy
from vtp.params import read_parameters, split_address
from vtp.texts import message

MAX_HEAD = 64 << 10
CHUNK = 64 << 10
ADDRESSES_TRIED = 3
RESOLVERS = 64  # threads: a name server that does not answer holds one for many seconds
PASSED_ON = (b"content-type", b"location")
ROBOTS = b"x-robots-tag"
# Directives with a value, which look like the name of a robot: `noai, max-snippet: 5`.
VALUED = ("max-snippet", "max-image-preview", "max-video-preview", "unavailable_after")
T = TypeVar("T")


class Refused(Exception):
    """There is no picture; the message is the cause, in few words."""

    def __init__(self, cause: str, status: int = HTTPStatus.BAD_GATEWAY) -> None:
        super().__init__(cause)
        self.status = status


class Answer(NamedTuple):
    """What img2dataset gets."""

    status: int
    reason: str
    headers: tuple[tuple[bytes, bytes], ...] = ()
    body: bytes = b""

    def events(self) -> tuple[h11.Event, ...]:
        """To be sent. Raises h11.LocalProtocolError for headers that must not."""
        headers = [*self.headers, (b"content-length", b"%d" % len(self.body)), (b"connection", b"close")]
        head = h11.Response(status_code=self.status, reason=self.reason.encode(), headers=headers)
        return head, h11.Data(data=self.body), h11.EndOfMessage()


class EgressProxy:
    """The proxy: `serve` is the callback of an asyncio server, and answers one request per connection."""

    def __init__(self, policy: Policy) -> None:
        self._policy = policy
        self._tls = ssl.create_default_context()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Answer a client of ours, whatever happens."""
        connection = h11.Connection(h11.SERVER, max_incomplete_event_size=MAX_HEAD)
        try:
            request = await self._soon(_request(connection, reader))
            for event in await self._answer(request):
                writer.write(connection.send(event) or b"")
            await self._soon(writer.drain())
        except (Refused, OSError, h11.ProtocolError):
            pass  # the client is gone, or is none of ours
        finally:
            writer.close()

    async def _answer(self, request: h11.Request) -> tuple[h11.Event, ...]:
        """What to send, in any case: a row whose request is never answered would be asked for again and again."""
        try:
            async with asyncio.timeout(self._time_left(request)):
                return (await self._fetch(request)).events()
        except Refused as refused:
            answer = Answer(refused.status, PREFIX + str(refused))
        except TimeoutError:
            answer = Answer(HTTPStatus.GATEWAY_TIMEOUT, PREFIX + "deadline")
        except Exception as error:
            answer = Answer(HTTPStatus.INTERNAL_SERVER_ERROR, PREFIX + f"error ({type(error).__name__})")
        return answer.events()

    def _time_left(self, request: h11.Request) -> float:
        """Seconds: the whole deadline, or what earlier hops of the attempt left of it."""
        stamp = _header(request, DEADLINE_HEADER.encode())
        try:
            return min(self._policy.deadline, float(stamp) - time.time())
        except ValueError:
            return self._policy.deadline

    async def _fetch(self, request: h11.Request) -> Answer:
        if request.method != b"GET":
            raise Refused("method refused", HTTPStatus.METHOD_NOT_ALLOWED)
        url = self._checked(request.target.decode("ascii"))
        tls = url.scheme == "https"
        port = url.port or (443 if tls else 80)
        if not self._policy.allows_port(port):
            raise Refused("port refused", HTTPStatus.FORBIDDEN)
        host = url.hostname or ""
        reader, writer = await self._connect(host, port, self._tls if tls else None)
        try:
            agent = _header(request, b"user-agent")
            return await self._exchange(url, agent, reader, writer)
        finally:
            writer.transport.abort()

    def _checked(self, target: str) -> SplitResult:
        try:
            url = urlsplit(target)
            if url.scheme not in SCHEMES:
                raise Refused("scheme refused", HTTPStatus.FORBIDDEN)
            if not url.hostname or url.port == 0:
                raise Refused("bad url", HTTPStatus.BAD_REQUEST)
        except ValueError:
            raise Refused("bad url", HTTPStatus.BAD_REQUEST) from None
        return url

    async def _connect(
        self, host: str, port: int, tls: ssl.SSLContext | None
    ) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """A connection to an address that was checked; the name is not resolved again."""
        name = host if tls else None
        for address in (await self._resolve(host, port))[:ADDRESSES_TRIED]:
            try:
                return await self._soon(asyncio.open_connection(address, port, ssl=tls, server_hostname=name))
            except ssl.SSLError:
                raise Refused("tls error") from None
            except OSError:
                continue
        raise Refused("no connection")

    async def _resolve(self, host: str, port: int) -> list[str]:
        try:
            resolved = await self._soon(asyncio.get_running_loop().getaddrinfo(host, port, proto=6))
        except (OSError, UnicodeError):
            raise Refused("host not found") from None
        addresses = list(dict.fromkeys(str(entry[4][0]) for entry in resolved))
        # All of them: which one is tried must not decide.
        if not all(self._policy.allows_address(address) for address in addresses):
            raise Refused("address refused", HTTPStatus.FORBIDDEN)
        return addresses

    async def _exchange(
        self, url: SplitResult, agent: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> Answer:
        connection = h11.Connection(h11.CLIENT, max_incomplete_event_size=MAX_HEAD)
        target = (url.path or "/") + (f"?{url.query}" if url.query else "")
        headers = {"Host": url.netloc.rpartition("@")[2], "User-Agent": agent, "Accept": "image/*,*/*;q=0.8"}
        headers |= {"Accept-Encoding": "identity", "Connection": "close"}
        try:
            question = h11.Request(method="GET", target=target, headers=list(headers.items()))
        except (h11.ProtocolError, UnicodeError):
            raise Refused("bad url", HTTPStatus.BAD_REQUEST) from None
        writer.write((connection.send(question) or b"") + (connection.send(h11.EndOfMessage()) or b""))
        cause = "bad gateway"
        try:
            await self._soon(writer.drain())
            head = await self._head(connection, reader)
            answer = Answer(head.status_code, _phrase(head.status_code), _passed_on(head))
            if not 200 <= head.status_code < 300:  # whatever page comes along is no picture
                return answer
            cause = "truncated body"
            body = await self._body(connection, reader, int(_header(head, b"content-length") or 0))
        except (h11.ProtocolError, OSError):
            raise Refused(cause) from None
        return answer._replace(body=body)

    async def _head(self, connection: h11.Connection, reader: asyncio.StreamReader) -> h11.Response:
        while True:
            event = connection.next_event()
            if isinstance(event, h11.Response):
                return event
            if event is h11.NEED_DATA:
                connection.receive_data(await self._soon(reader.read(CHUNK)))
            elif isinstance(event, h11.ConnectionClosed):
                raise Refused("bad gateway")

    async def _body(self, connection: h11.Connection, reader: asyncio.StreamReader, announced: int) -> bytes:
        body = bytearray()
        while True:
            if max(announced, len(body)) > self._policy.max_bytes:
                raise Refused("too large")
            event = connection.next_event()
            if isinstance(event, h11.Data):
                body += event.data
            elif event is h11.NEED_DATA:
                connection.receive_data(await self._soon(reader.read(CHUNK)))
            else:  # an early end is a ProtocolError
                return bytes(body)

    async def _soon(self, awaitable: Awaitable[T]) -> T:
        """The result, within the time of one operation."""
        try:
            async with asyncio.timeout(self._policy.timeout):
                return await awaitable
        except TimeoutError:
            raise Refused("time out", HTTPStatus.GATEWAY_TIMEOUT) from None


async def _request(connection: h11.Connection, reader: asyncio.StreamReader) -> h11.Request:
    while True:
        event = connection.next_event()
        if isinstance(event, h11.Request):
            return event
        if event is not h11.NEED_DATA:
            raise h11.RemoteProtocolError("no request")
        connection.receive_data(await reader.read(CHUNK))


def _header(message: h11.Request | h11.Response, name: bytes) -> str:
    """A header's value, or nothing."""
    return next((value.decode("latin-1") for key, value in message.headers if key == name), "")


def _passed_on(head: h11.Response) -> tuple[tuple[bytes, bytes], ...]:
    plain = [(name, value) for name, value in head.headers if name in PASSED_ON]
    tags = [value.decode("latin-1") for name, value in head.headers if name == ROBOTS]
    return (*plain, *((ROBOTS, each.encode("latin-1")) for tag in tags for each in robots_directives(tag)))


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


def _phrase(status: int) -> str:
    return HTTPStatus(status).phrase if status in HTTPStatus._value2member_map_ else ""


def load_policy(address: str) -> Policy:
    """`policy` of the section at `FILE:SECTION`. Raises ConfigError."""
    path, section = split_address(address)
    values = read_parameters(path).values.get(section)
    if not isinstance(values, dict) or "policy" not in values:
        raise ConfigError(f"{path}: no section {section!r} with a policy")
    return Policy.parse(values["policy"], where=f"{address}.policy")


async def serve(policy: Policy, host: str, port: int, *, follow: bool) -> None:
    """Answer for ever; the address is written to stdout when the proxy is ready. Several share a port."""
    loop = asyncio.get_running_loop()
    if follow:
        loop.add_reader(sys.stdin, os._exit, 0)  # the end of stdin is that of the process which holds the other side
    loop.set_default_executor(ThreadPoolExecutor(RESOLVERS))
    server = await asyncio.start_server(EgressProxy(policy).serve, host, port, backlog=4096, reuse_port=True)
    name, number = server.sockets[0].getsockname()[:2]
    sys.stdout.write(f"{name}:{number}\n")
    sys.stdout.flush()
    async with server:
        await server.serve_forever()


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        "python -m vtp.curation.download.egress_proxy", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("address", metavar="FILE:SECTION", help="parameters of the download")
    parser.add_argument("--listen", default="127.0.0.1:0", metavar="HOST:PORT", help="port 0: any free one")
    parser.add_argument("--follow", action="store_true", help="end when stdin ends")
    arguments = parser.parse_args()
    host, _, port = arguments.listen.rpartition(":")
    try:
        policy = load_policy(arguments.address)
    except ConfigError as error:
        sys.exit(message(f"error: {error}"))
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))  # two sockets for each picture on its way
    asyncio.run(serve(policy, host, int(port), follow=arguments.follow))


if __name__ == "__main__":
    main()
