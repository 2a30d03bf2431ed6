"""A loopback HTTP server of awkward pictures: everything that a list of URLs of the open web holds, in small.

    python tests/servers.py --urls FOLDER/metadata.parquet --count 200 --port 8000

writes metadata as DataComp publishes it, of `count` good pictures and some bad rows, and serves them until it is stopped.
"""

import argparse
import hashlib
import io
import struct
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import numpy as np
from PIL import Image, ImageDraw

if TYPE_CHECKING:
    import pyarrow as pa

COLOURS = {"red": (200, 30, 40), "green": (40, 160, 60), "blue": (30, 60, 200), "yellow": (230, 210, 40)}
COLOURS |= {"white": (250, 250, 250), "black": (10, 10, 10), "purple": (140, 40, 160), "orange": (240, 140, 20)}
SIZE = (64, 48)
VARIETY = 16  # kinds of one format
LIMIT = 1 << 20  # bytes; the bodies of `big` are larger
GOOD = ("jpeg", "png", "webp", "gif", "cmyk", "grey16", "rgb16", "alpha", "turned", "dot")


def drawing(n: int, size: tuple[int, int] = SIZE) -> Image.Image:
    """Coloured shapes that differ for every n."""
    random = np.random.default_rng(n)
    names = list(COLOURS)
    picture = Image.new("RGB", size, COLOURS[names[n % len(names)]])
    draw = ImageDraw.Draw(picture)
    for _ in range(4):
        x, y, right, bottom = (random.random(4) * [size[0], size[1], size[0] / 2, size[1] / 2]).astype(int).tolist()
        draw.rectangle((x, y, x + 6 + right, y + 6 + bottom), fill=COLOURS[names[random.integers(len(names))]])
    return picture


def encoded(picture: Image.Image, kind: str, **options: object) -> bytes:
    file = io.BytesIO()
    picture.save(file, kind, **options)
    return file.getvalue()


def png(width: int, height: int, depth: int, colour: int, data: bytes) -> bytes:
    """A PNG with any header; `data` is not compressed yet."""
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(data, 9)), (b"IEND", b""))
    body = (struct.pack(">I", len(c)) + kind + c + struct.pack(">I", zlib.crc32(kind + c)) for kind, c in chunks)
    return b"\x89PNG\r\n\x1a\n" + b"".join(body)


def halves(mode: str = "RGB") -> Image.Image:
    """Red on the left, blue on the right."""
    picture = Image.new(mode, SIZE, COLOURS["red"])
    picture.paste(COLOURS["blue"], (SIZE[0] // 2, 0, *SIZE))
    return picture


def _turned() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6  # upright after a quarter turn clockwise
    return encoded(halves(), "JPEG", quality=95, exif=exif)


def _rgb16() -> bytes:
    pixel = struct.pack(">HHH", 200 << 8, 30 << 8, 40 << 8)
    return png(32, 24, 16, 2, (b"\0" + pixel * 32) * 24)


def _alpha() -> bytes:
    return encoded(Image.new("RGBA", SIZE, (0, 0, 0, 128)), "PNG")


@lru_cache(maxsize=1024)
def body(kind: str, n: int) -> bytes:
    """What the server sends for `/kind/n`, when that is a whole answer."""
    makers: dict[str, Callable[[], bytes]] = {
        "jpeg": lambda: encoded(drawing(n), "JPEG", quality=90),
        "png": lambda: encoded(drawing(n), "PNG"),
        "webp": lambda: encoded(drawing(n), "WEBP"),
        "gif": lambda: encoded(drawing(n).quantize(16), "GIF"),
        "cmyk": lambda: encoded(halves().convert("CMYK"), "JPEG", quality=95),
        "grey16": lambda: encoded(Image.fromarray(np.full(SIZE[::-1], 40_000, np.uint16)), "PNG"),
        "rgb16": _rgb16,
        "alpha": _alpha,
        "turned": _turned,
        "dot": lambda: encoded(Image.new("RGB", (1, 1), COLOURS["green"]), "PNG"),
        "wide": lambda: encoded(drawing(n, (10_000, 500)), "JPEG"),
        "thin": lambda: encoded(drawing(n, (10_000, 20)), "PNG"),
        "large": lambda: encoded(Image.new("RGB", (5_000, 3_600), COLOURS["blue"]), "JPEG"),
        "html": lambda: b"<!doctype html><title>This picture has moved</title>" + b" " * 400,
        "empty": lambda: b"",
        "cut": lambda: encoded(drawing(n), "JPEG", quality=90)[:-100],
        "cut_png": lambda: encoded(drawing(n), "PNG")[:-60],
        "bomb": lambda: png(50_000, 50_000, 8, 2, b"\0" * 1000),
        "real_bomb": lambda: png(20_000, 20_000, 1, 0, bytes(2501 * 20_000)) if n == 0 else body(kind, 0),
        "big": lambda: body("jpeg", n) + b"\0" * (LIMIT + 1),
    }
    return makers[kind]()


class Handler(BaseHTTPRequestHandler):
    """Answers `/kind/n`; what a kind does stands in its `answer_` method, or in `body`."""

    protocol_version = "HTTP/1.1"
    refused: ClassVar[tuple[str, ...]] = ()

    def do_GET(self) -> None:
        with self.server.lock:
            self.again = self.path in self.server.seen
            self.server.seen.add(self.path)
            self.server.requests.append(self.path)
        _, kind, n = self.path.split("?")[0].split("/", 2)
        time.sleep(self.server.delay)
        try:
            special = getattr(self, f"answer_{kind}", None)
            special(n) if special else self.send(body(kind, int(n) % VARIETY))
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True

    def send(self, content: bytes, status: int = 200, length: int | None = None, **headers: str) -> None:
        self.send_response(status)
        self.send_header("Content-Type", "image/jpeg")
        self.send_header("Content-Length", str(len(content) if length is None else length))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(content)

    def chunks(self, pieces: Iterator[bytes]) -> None:
        self.send_response(200)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        for piece in pieces:
            self.wfile.write(b"%x\r\n%s\r\n" % (len(piece), piece))

    def answer_photo(self, n: str) -> None:
        self.send(photo(int(n)))

    def answer_missing(self, n: str) -> None:
        self.send(b"no such picture", 404)

    def answer_error(self, n: str) -> None:
        self.send(b"oops", 500)

    def answer_flaky(self, n: str) -> None:
        self.send(body("jpeg", 1), 200 if self.again else 503)

    def answer_moved(self, n: str) -> None:
        self.send(b"", 302, Location=f"/jpeg/{n}")

    def answer_loop(self, n: str) -> None:
        self.send(b"", 302, Location=f"/loop/{n}")

    def answer_relay(self, n: str) -> None:
        """A chain of redirects, none of them slow."""
        time.sleep(1.0)
        self.send(b"", 302, Location=f"/relay/{int(n) + 1}")

    def answer_away(self, n: str) -> None:
        """To where it must not go."""
        self.send(b"", 301, Location=self.server.away[int(n)])

    def answer_twice_away(self, n: str) -> None:
        self.send(b"", 307, Location=f"/away/{n}")

    def answer_drip(self, n: str) -> None:
        self.send(b"\xff\xd8", length=1000)
        for _ in range(100):
            time.sleep(0.2)
            self.wfile.write(b"\0")

    def answer_drip_head(self, n: str) -> None:
        for letter in "HTTP/1.1 200 OK\r\nServer: " + "x" * 100:
            time.sleep(0.2)
            self.wfile.write(letter.encode())

    def answer_stalled(self, n: str) -> None:
        time.sleep(20)
        self.close_connection = True

    def answer_stalled_body(self, n: str) -> None:
        self.send(b"\xff\xd8", length=1000)
        time.sleep(20)
        self.close_connection = True

    def answer_half(self, n: str) -> None:
        self.send(body("jpeg", 1)[:200], length=len(body("jpeg", 1)))
        self.close_connection = True

    def answer_half_chunked(self, n: str) -> None:
        self.chunks(iter([body("jpeg", 1)[:200]]))
        self.close_connection = True

    def answer_chunked(self, n: str) -> None:
        self.chunks(iter([body("jpeg", 1)[:200], body("jpeg", 1)[200:], b""]))

    def answer_big_chunked(self, n: str) -> None:
        self.chunks(b"\0" * 65_536 for _ in range(1000))

    def answer_endless(self, n: str) -> None:
        """Without a length, to the end of the connection."""
        self.wfile.write(b"HTTP/1.0 200 OK\r\nContent-Type: image/jpeg\r\n\r\n")
        for _ in range(1000):
            self.wfile.write(b"\0" * 65_536)

    def answer_garbage(self, n: str) -> None:
        self.wfile.write(b"SSH-2.0-OpenSSH_9.2\r\n\r\n")
        self.close_connection = True

    def answer_headers(self, n: str) -> None:
        self.wfile.write(b"HTTP/1.1 200 OK\r\n" + b"X-More: more\r\n" * 20_000 + b"\r\n")
        self.close_connection = True

    def answer_noai(self, n: str) -> None:
        self.send(body("jpeg", 1), X_Robots_Tag="NoAI, max-snippet: 5" if int(n) % 2 else "noimageai")

    def answer_robots(self, n: str) -> None:
        """Directives that are not about us."""
        tags = ("otherbot: noai", "nofollow", "otherbot: noai,", "otherbot:")
        self.send(body("jpeg", 1), X_Robots_Tag=tags[int(n) % len(tags)])

    def answer_impostor(self, n: str) -> None:
        self.wfile.write(b"HTTP/1.1 403 proxy: opted out\r\nContent-Length: 0\r\n\r\n")

    def log_message(self, *arguments: object) -> None: ...


class Server(ThreadingHTTPServer):
    """With a log of the paths that were asked for, and where `/away/n` leads."""

    daemon_threads = True
    request_queue_size = 512

    def __init__(self, port: int = 0, host: str = "127.0.0.1") -> None:
        super().__init__((host, port), Handler)
        self.lock = threading.Lock()
        self.requests: list[str] = []
        self.seen: set[str] = set()
        self.away: list[str] = []
        self.delay = 0.0

    def prepare(self, *kinds: str) -> None:
        """Make the bodies of kinds now: an answer must not be slow by accident."""
        for kind in kinds:
            for n in range(VARIETY):
                body(kind, n)

    def url(self, kind: str, n: object = 0) -> str:
        return f"http://127.0.0.1:{self.server_port}/{kind}/{n}"

    def handle_error(self, *arguments: object) -> None: ...


@contextmanager
def serving(port: int = 0) -> Iterator[Server]:
    """A running server."""
    server = Server(port)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()


@lru_cache(maxsize=4096)
def photo(n: int) -> bytes:
    """A good picture for the whole pipeline: no two are alike."""
    random = np.random.default_rng(n)
    size = tuple((96 + random.integers(0, 64, 2)).tolist())
    return encoded(drawing(n, size), ("JPEG", "PNG", "WEBP")[n % 3])


def write_imagenet(folder: Path, *, train: int, validation: int) -> None:
    """Four classes as ImageNet names them, `train/<synset>/` and `val/<synset>/`, so many good pictures of each."""
    for part, first, count in (("train", 0, train), ("val", 50, validation)):
        for index, synset in enumerate(("n01440764", "n01443537", "n02123045", "n03000684")):
            place = folder / part / synset
            place.mkdir(parents=True)
            for number in range(count):
                (place / f"{synset}_{number}.JPEG").write_bytes(photo(100 * index + first + number))


def write_metadata(path: Path, server: Server, count: int) -> None:
    """Parquet as DataComp publishes it."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    random = np.random.default_rng(0)
    bodies = [photo(n) for n in range(count)]
    sizes = [Image.open(io.BytesIO(content)).size for content in bodies]
    names = list(COLOURS)
    table = {
        "uid": [hashlib.md5(str(n).encode()).hexdigest() for n in range(count)],
        "url": [server.url("photo", n) for n in range(count)],
        "text": [f"drawing number {n} of rectangles on a {names[n % len(names)]} ground" for n in range(count)],
        "original_width": pa.array([width for width, _ in sizes], pa.int32()),
        "original_height": pa.array([height for _, height in sizes], pa.int32()),
        "clip_b32_similarity_score": pa.array(random.random(count) * 0.4, pa.float32()),
        "clip_l14_similarity_score": pa.array(random.random(count) * 0.4, pa.float32()),
        "sha256": [hashlib.sha256(content).hexdigest() for content in bodies],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(table), path)


def bad_rows(server: Server, schema: "pa.Schema", counts: dict[str, int]) -> "pa.Table":
    """Rows of pages that give no picture, so many of each kind, and of a picture that was listed before, twice."""
    import pyarrow as pa

    urls = [server.url(kind, n) for kind, count in counts.items() for n in range(count)] + [server.url("photo", 30)] * 2
    rows = [
        {
            "uid": hashlib.md5(f"bad {n}".encode()).hexdigest(),
            "url": url,
            "text": f"number {n} of the bad rows",
            "original_width": 100,
            "original_height": 100,
            "clip_b32_similarity_score": 0.3,
            "clip_l14_similarity_score": 0.3,
            "sha256": None,
        }
        for n, url in enumerate(urls)
    ]
    return pa.Table.from_pylist(rows, schema)


def main() -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--urls", type=Path, required=True, help="parquet to write")
    parser.add_argument("--count", type=int, required=True, help="good pictures")
    parser.add_argument("--port", type=int, default=0)
    arguments = parser.parse_args()
    server = Server(arguments.port)
    write_metadata(arguments.urls, server, arguments.count)
    good = pq.read_table(arguments.urls)
    few = max(1, arguments.count // 50)
    kinds = dict.fromkeys(("missing", "error", "html", "noai", "cut", "loop"), few)
    pq.write_table(pa.concat_tables([good, bad_rows(server, good.schema, kinds)]), arguments.urls)
    print(f"serving {arguments.count} pictures at {server.url('photo')}", flush=True)  # noqa: T201 - to whoever started it
    server.serve_forever()


if __name__ == "__main__":
    main()
