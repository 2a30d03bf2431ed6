"""Shards elsewhere: fetched through a bounded folder, from a mounted disk, over HTTP and from S3, all on loopback."""

import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from multiprocessing import get_context

import pytest
from data.small_shards import fetched, write_shards
from data.test_stream import seen, stream_of

from vtp.artefact import ArtefactError, read_json, write_json
from vtp.config import ConfigError
from vtp.data.dataset import DataError, ShardDataset
from vtp.data.remote import RemoteError, ShardCache
from vtp.data.stream import Stream, StreamConfig

SIZES = [10, 14, 12, 12]
PLAIN = StreamConfig(samples=None, window=2, groups=1, mixture=None, decode="full", max_replaced=0.0)


def moved(folder, place, location):
    """Put the tars of a folder at `place`; the folder keeps the rest and says where they are."""
    place.mkdir()
    for path in folder.glob("*.tar"):
        path.rename(place / path.name)
    write_json(folder / "manifest.json", read_json(folder / "manifest.json") | {"location": location})


def remote_stream(folder, cache):
    return Stream([ShardDataset(folder, "train", cache=cache)], PLAIN, seed=0)


class Quiet(SimpleHTTPRequestHandler):
    """A web server of files that remembers what was asked."""

    def log_message(self, *arguments):
        pass

    def do_GET(self):
        self.server.asked.append(self.path)
        super().do_GET()


@pytest.fixture
def web(tmp_path):
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=tmp_path))
    server.asked = []
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()


@pytest.fixture
def s3(monkeypatch):
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server._server.server_port}")
    for name, value in (("ACCESS_KEY_ID", "a"), ("SECRET_ACCESS_KEY", "b"), ("DEFAULT_REGION", "us-east-1")):
        monkeypatch.setenv(f"AWS_{name}", value)
    yield server
    server.stop()


def test_shards_of_a_mounted_disk(tmp_path):
    """The same samples as beside the manifest; two workers share the folder; it stays within its bound."""
    folder = write_shards(tmp_path / "shards", SIZES)
    expected = seen(stream_of(folder, window=2), range(12))
    moved(folder, tmp_path / "elsewhere", f"file://{tmp_path}/elsewhere")
    largest = max(path.stat().st_size for path in (tmp_path / "elsewhere").iterdir())
    cache = ShardCache(tmp_path / "cache", capacity=3 * largest)
    assert (seen(remote_stream(folder, cache), range(12), workers=2) == expected).all()
    held = list((tmp_path / "cache").glob("*.tar"))
    assert sum(path.stat().st_size for path in held) <= 3 * largest
    assert 1 <= len(held) < len(SIZES)
    small = ShardCache(tmp_path / "cache", capacity=1.5 * largest)
    with pytest.raises(ConfigError, match=r"window 2 reads .* GB of fetched shards together, .* VTP_CACHE_GIGABYTES"):
        remote_stream(folder, small)
    with pytest.raises(DataError, match="no cache folder was given"):
        ShardDataset(folder, "train").content(0)


def test_shards_over_http(tmp_path, web):
    """Each is fetched once for all processes; one that fails is tried again, and named when that does not help."""
    folder = write_shards(tmp_path / "shards", SIZES)
    moved(folder, tmp_path / "elsewhere", f"http://127.0.0.1:{web.server_port}/elsewhere")
    cache = ShardCache(tmp_path / "cache", capacity=1e9)
    shards = ShardDataset(folder, "train", cache=cache).shards
    with get_context("spawn").Pool(3) as pool:
        location = f"http://127.0.0.1:{web.server_port}/elsewhere"
        sizes = pool.starmap(fetched, [(cache, location, shards[number % 4]) for number in range(24)])
    assert sizes == [shards[number % 4].bytes for number in range(24)]
    assert sorted(path for path in web.asked if path.endswith(".tar")) == [
        f"/elsewhere/{shard.name}" for shard in shards
    ]


def test_what_others_fetch_meanwhile_counts_too(tmp_path, monkeypatch):
    folder = write_shards(tmp_path / "shards", SIZES)
    moved(folder, tmp_path / "elsewhere", f"file://{tmp_path}/elsewhere")
    dataset = ShardDataset(folder, "train")
    cache = ShardCache(tmp_path / "cache", capacity=2 * max(shard.bytes for shard in dataset.shards))
    plain = ShardCache._fetch

    def fetch(self, url, shard, path):
        plain(self, url, shard, path)
        for number in range(3):
            (self.folder / f"{number}.tar").write_bytes(bytes(shard.bytes))

    monkeypatch.setattr(ShardCache, "_fetch", fetch)
    assert fetched(cache, f"file://{tmp_path}/elsewhere", dataset.shards[0]) == dataset.shards[0].bytes
    assert sum(path.stat().st_size for path in (tmp_path / "cache").glob("*.tar")) <= cache.capacity


def test_a_shard_that_cannot_be_fetched_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr("vtp.data.remote.FIRST_WAIT", 0.01)
    folder = write_shards(tmp_path / "shards", SIZES)
    place = tmp_path / "elsewhere"
    moved(folder, place, f"file://{place}")
    cache = ShardCache(tmp_path / "cache", capacity=1e9)
    opened = ShardDataset(folder, "train", cache=cache)
    content = (place / "train-00001.tar").read_bytes()
    (place / "train-00001.tar").write_bytes(content[:-1] + b"x")
    with pytest.raises(RemoteError, match=r"train-00001\.tar: not fetched in 4 attempts .*sha256"):
        opened.content(12)
    assert not list((tmp_path / "cache").glob("*tmp*"))
    (place / "train-00001.tar").unlink()
    with pytest.raises(ArtefactError, match=r"train-00001\.tar: manifest\.json says \d+ bytes, found nothing"):
        ShardDataset(folder, "train", cache=cache)
    with pytest.raises(ArtefactError, match="nowhere"):
        moved_again = read_json(folder / "manifest.json") | {"location": "nowhere://bucket"}
        write_json(folder / "manifest.json", moved_again)
        ShardDataset(folder, "train", cache=cache)


def test_shards_in_s3(tmp_path, s3):
    """A real server on loopback, real forked workers."""
    import fsspec

    folder = write_shards(tmp_path / "shards", SIZES)
    expected = seen(stream_of(folder, window=2), range(12))
    moved(folder, tmp_path / "elsewhere", "s3://bucket/shards")
    bucket = fsspec.filesystem("s3", skip_instance_cache=True)
    bucket.mkdir("bucket")
    bucket.put(f"{tmp_path}/elsewhere/", "bucket/shards/", recursive=True)
    cache = ShardCache(tmp_path / "cache", capacity=1e9)
    stream = remote_stream(folder, cache)
    assert (seen(stream, range(6)) == expected[:6]).all()
    assert (seen(stream, range(6, 12), ranks=2, workers=1) == expected[6:]).all()
