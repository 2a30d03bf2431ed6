"""Shards elsewhere: fetched through a bounded folder, from a mounted disk, over HTTP and from S3, all on loopback."""

import contextlib
import hashlib
import resource
import signal
import socket
import threading
import time
from functools import partial
from multiprocessing import get_context

import numpy as np
import pytest
from data.small_shards import fetched, write_shards
from data.test_stream import seen, stream_of
from fsspec.implementations.local import LocalFileSystem

from benchmarks._slow_store import slow_store
from vtp import artefact
from vtp.artefact import ArtefactError, read_json, write_json
from vtp.config import ConfigError
from vtp.data.dataset import DataError, ShardDataset
from vtp.data.order import epochs
from vtp.data.remote import RemoteError, ShardCache
from vtp.data.stream import Stream, StreamConfig
from vtp.data.transfer import PATIENCE, persist

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


@pytest.fixture
def web(tmp_path):
    with slow_store(tmp_path / "elsewhere") as store:
        yield store


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


def elsewhere(tmp_path, web, sizes=SIZES) -> ShardDataset:
    """Shards whose tars the server has."""
    folder = write_shards(tmp_path / "shards", sizes)
    moved(folder, tmp_path / "elsewhere", web.url)
    return ShardDataset(folder, "train", cache=ShardCache(tmp_path / "cache", capacity=1e9))


def in_processes(*functions):
    """Run each in a process of its own; what they return."""
    queue, context = get_context("fork").Queue(), get_context("fork")
    workers = [context.Process(target=lambda n=n, f=f: queue.put((n, f()))) for n, f in enumerate(functions)]
    for worker in workers:
        worker.start()
    answers = dict(queue.get(timeout=60) for _ in workers)
    for worker in workers:
        worker.join()
    return [answers[number] for number in range(len(functions))]


def on_disk(folder) -> int:
    """Bytes of all shards and parts of shards."""
    sizes = []
    for path in folder.iterdir():
        with contextlib.suppress(FileNotFoundError):
            sizes.append(path.stat().st_size)
    return sum(sizes)


def test_shards_over_http(tmp_path, web):
    """Each is fetched once for all processes, and moves once."""
    dataset = elsewhere(tmp_path, web)
    shards, cache = dataset.shards, dataset.cache
    reads = [lambda n=n: [fetched(cache, web.url, shards[(n + k) % 4]) for k in range(8)] for n in range(3)]
    for number, sizes in enumerate(in_processes(*reads)):
        assert sizes == [shards[(number + k) % 4].bytes for k in range(8)]
    assert web.sent == {shard.name: shard.bytes for shard in shards}


def test_what_is_on_its_way_takes_room(tmp_path, web):
    """Sixteen processes fetch sixteen shards into the room of four; the folder never holds more than its bound."""
    web.rate = 2e6
    dataset = elsewhere(tmp_path, web, [12] * 16)
    largest = max(shard.bytes for shard in dataset.shards)
    cache, most, done = ShardCache(tmp_path / "cache", capacity=4 * largest), [], threading.Event()
    cache.folder.mkdir()

    def watch():
        while not done.is_set():
            most.append(on_disk(cache.folder))

    watcher = threading.Thread(target=watch)
    watcher.start()
    sizes = in_processes(*(lambda shard=shard: fetched(cache, web.url, shard) for shard in dataset.shards))
    done.set()
    watcher.join()
    assert sizes == [shard.bytes for shard in dataset.shards]
    assert largest < max(most) <= cache.capacity
    assert not list(cache.folder.glob(".*.tmp"))


def test_a_shard_larger_than_the_room_is_read_all_the_same(tmp_path, web):
    dataset = elsewhere(tmp_path, web)
    cache = ShardCache(tmp_path / "cache", capacity=1.0)
    for shard in dataset.shards:
        assert fetched(cache, web.url, shard) == shard.bytes
    assert len(list(cache.folder.glob("*.tar"))) == 1


def test_what_is_read_stays_while_other_shards_can_go(tmp_path, web):
    dataset = elsewhere(tmp_path, web, [12] * 4)
    shards = dataset.shards
    cache = ShardCache(tmp_path / "cache", capacity=2.5 * shards[0].bytes)
    with cache.open(web.url, shards[0]):
        for shard in (*shards[1:], shards[0]):
            fetched(cache, web.url, shard)
        assert web.sent[shards[0].name] == shards[0].bytes  # once
        assert cache.fetch_ahead(web.url, shards[1])  # in the place of one that was read
        assert not cache.fetch_ahead(web.url, shards[2])  # now only that one, or what is read, could go
    fetched(cache, web.url, shards[3])
    assert cache.has(shards[1])


@pytest.mark.parametrize("failures", [[503, 429], [500, 502, 504], ["reset"], [408, "reset", 503]])
def test_what_passes_is_tried_again(tmp_path, web, monkeypatch, failures):
    monkeypatch.setattr("vtp.data.transfer.FIRST_WAIT", 0.01)
    dataset = elsewhere(tmp_path, web)
    web.failures["train-00001.tar"] = [*failures]
    assert dataset.caption(12) == "12"
    assert len(dataset.content(12))
    assert not web.failures["train-00001.tar"]
    assert not list((tmp_path / "cache").glob(".*.tmp"))


@pytest.mark.parametrize("status", [401, 403, 404, 410])
def test_what_does_not_pass_is_told_at_once(tmp_path, web, status):
    dataset = elsewhere(tmp_path, web)
    web.failures["train-00001.tar"] = [status] * 9
    with pytest.raises(RemoteError, match=r"/train-00001\.tar: not fetched in 1 attempts"):
        dataset.content(12)
    assert len(web.failures["train-00001.tar"]) == 8


def test_patience_lasts_minutes_and_waits_are_uneven(tmp_path, monkeypatch):
    """A store that never comes back: the waits grow to half a minute and add up to ten; no two processes wait alike."""
    clock, waits, own, sleep = [0.0], [], threading.get_ident(), time.sleep
    monkeypatch.setattr("vtp.data.transfer.time.monotonic", lambda: clock[0])

    def wait(seconds):
        if threading.get_ident() != own:  # what an earlier test left waits on
            sleep(seconds)
            return
        waits.append(seconds)
        clock[0] += seconds

    monkeypatch.setattr("vtp.data.transfer.time.sleep", wait)

    def refuse():
        raise ConnectionResetError("reset")

    for _ in range(2):
        with pytest.raises(RemoteError, match=r"here: not fetched in \d+ attempts within \d+ s \(reset\)"):
            persist("here", refuse, patience=PATIENCE)
    half = len(waits) // 2
    assert 500 < sum(waits[:half]) <= 600
    assert max(waits) <= 45
    assert waits[0] < 1
    assert waits[:half] != waits[half:]


def test_a_store_that_hesitates_at_the_start_is_waited_for(tmp_path, web, monkeypatch):
    monkeypatch.setattr("vtp.data.transfer.FIRST_WAIT", 0.01)
    listed, plain = [], LocalFileSystem.ls

    def ls(self, *arguments, **options):
        listed.append(1)
        if len(listed) < 3:
            raise TimeoutError("no answer")
        return plain(self, *arguments, **options)

    folder = write_shards(tmp_path / "shards", SIZES)
    moved(folder, tmp_path / "elsewhere", f"file://{tmp_path}/elsewhere")
    monkeypatch.setattr(LocalFileSystem, "ls", ls)
    assert len(ShardDataset(folder, "train")) == sum(SIZES)
    assert len(listed) == 3


def test_a_shard_that_cannot_be_fetched_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr("vtp.data.transfer.FIRST_WAIT", 0.01)
    folder = write_shards(tmp_path / "shards", SIZES)
    place = tmp_path / "elsewhere"
    moved(folder, place, f"file://{place}")
    cache = ShardCache(tmp_path / "cache", capacity=1e9)
    opened = ShardDataset(folder, "train", cache=cache)
    content = (place / "train-00001.tar").read_bytes()
    for damaged, words in ((content[:-1] + b"x", "sha256"), (content + b"x", "at least"), (content[:-1], "bytes")):
        (place / "train-00001.tar").write_bytes(damaged)
        with pytest.raises(RemoteError, match=rf"train-00001\.tar: not fetched in 3 attempts .*{words}"):
            opened.content(12)
    assert not list((tmp_path / "cache").glob(".*.tmp"))
    (place / "train-00001.tar").unlink()
    with pytest.raises(ArtefactError, match=r"train-00001\.tar: manifest\.json says \d+ bytes, found nothing"):
        ShardDataset(folder, "train", cache=cache)
    with pytest.raises(ArtefactError, match="nowhere"):
        moved_again = read_json(folder / "manifest.json") | {"location": "nowhere://bucket"}
        write_json(folder / "manifest.json", moved_again)
        ShardDataset(folder, "train", cache=cache)


def test_a_full_disk_is_named(tmp_path, web):
    """With what to set, and at once."""
    dataset = elsewhere(tmp_path, web)
    cache = ShardCache(tmp_path / "cache", capacity=1e9)

    def fill():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
        try:
            fetched(cache, web.url, dataset.shards[0])
        except RemoteError as error:
            return str(error)

    [words] = in_processes(fill)
    assert "train-00000.tar cannot be kept there (File too large); make room, or set VTP_CACHE" in words
    assert not list(cache.folder.glob(".*.tmp"))


def test_a_damaged_file_of_the_cache_is_fetched_again(tmp_path, web, monkeypatch):
    """By whoever opens it next, and for large ones too, of which the digest is taken once."""
    dataset = elsewhere(tmp_path, web)
    cache, shard = dataset.cache, dataset.shards[0]
    path = cache.folder / f"{shard.sha256}.tar"
    for large in (1 << 30, 1):
        monkeypatch.setattr("vtp.data.remote.LARGE", large)
        for damage in (
            lambda content: content[:-9] + b"x" + content[-8:],
            lambda content: content[:-1],
            lambda content: b"",
        ):
            fetched(cache, web.url, shard)
            path.write_bytes(damage(path.read_bytes()))
            with cache.open(web.url, shard) as file:
                assert hashlib.sha256(file.read()).hexdigest() == shard.sha256


def test_large_files_are_read_through_once_on_a_machine(tmp_path, web, monkeypatch):
    """A shard here and one from elsewhere, whichever processes open them; a change of the file is seen."""
    monkeypatch.setattr("vtp.data.remote.LARGE", 1)
    monkeypatch.setattr("vtp.data.dataset.LARGE", 1)
    remote, read, plain = elsewhere(tmp_path, web), [], hashlib.file_digest
    local = write_shards(tmp_path / "local", [4], first=500)
    monkeypatch.setattr("hashlib.file_digest", lambda file, name: read.append(1) or plain(file, name))
    for _ in range(3):
        artefact.remembered.clear()  # as in another process
        fetched(remote.cache, web.url, remote.shards[0])
        here = ShardDataset(local, "train", cache=remote.cache)
        assert here.content(0)
        assert len(read) == 2
    content = (local / "train-00000.tar").read_bytes()
    (local / "train-00000.tar").write_bytes(content[:600] + bytes([content[600] ^ 1]) + content[601:])
    with pytest.raises(ArtefactError, match=r"train-00000\.tar has sha256 .*, not "):
        ShardDataset(local, "train", cache=remote.cache).content(0)


def test_what_a_killed_fetcher_left_goes(tmp_path, web):
    """And takes no room; what a living one has under way stays, and has a name of its own."""
    dataset = elsewhere(tmp_path, web)
    cache, shard = dataset.cache, dataset.shards[0]
    web.rate = 1e4
    killed = get_context("fork").Process(target=fetched, args=(cache, web.url, shard))
    killed.start()
    wait_for(lambda: list(cache.folder.glob(".*.tmp")))
    [left] = cache.folder.glob(".*.tmp")
    assert f".{socket.gethostname()}.{killed.pid}." in left.name
    assert left.stat().st_size == shard.bytes
    fetching = get_context("fork").Process(target=fetched, args=(cache, web.url, dataset.shards[1]))
    fetching.start()
    wait_for(lambda: len(list(cache.folder.glob(".*.tmp"))) == 2)
    killed.kill()
    killed.join()
    web.rate = float("inf")
    assert fetched(cache, web.url, dataset.shards[2]) == dataset.shards[2].bytes
    assert not left.exists()
    fetching.join()
    assert fetching.exitcode == 0


def test_files_that_vanish_are_no_error(tmp_path, web):
    """Somebody cleans the folder while others make room in it."""
    dataset = elsewhere(tmp_path, web, [4] * 8)
    cache = ShardCache(tmp_path / "cache", capacity=2.5 * dataset.shards[0].bytes)
    done = get_context("fork").Event()

    def clean():
        while not done.is_set():
            for path in [*cache.folder.glob("*.tar"), *cache.folder.glob("*.verified")]:
                path.unlink(missing_ok=True)

    def read(first):
        return lambda: [fetched(cache, web.url, dataset.shards[(first + n) % 8]) for n in range(16)]

    cleaner = get_context("fork").Process(target=clean)
    cleaner.start()
    answers = in_processes(read(0), read(3))
    done.set()
    cleaner.join()
    assert all(len(answer) == 16 for answer in answers)


def wait_for(condition) -> None:
    """At most twenty seconds."""
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def grouped_stream(folder, cache, *, window=4, groups=2) -> Stream:
    config = PLAIN.model_copy(update={"window": window, "groups": groups})
    return Stream([ShardDataset(folder, "train", cache=cache)], config, seed=0)


@pytest.mark.parametrize("mixture", [None, {"a": 0.5, "b": 0.5}])
def test_two_machines_move_the_data_once_between_them(tmp_path, web, mixture):
    """Each has a folder of its own, which holds two windows; an epoch moves every shard once, whoever is ahead."""
    folders = [write_shards(tmp_path / name, [8] * 16, first=first) for name, first in (("a", 0), ("b", 500))]
    (tmp_path / "elsewhere").mkdir()
    for folder in folders:
        moved(folder, tmp_path / "elsewhere" / folder.name, f"{web.url}/{folder.name}")
    config = PLAIN.model_copy(update={"window": 4, "groups": 2, "mixture": mixture})
    span, batch = (4, 8) if mixture is None else (8, 64)  # shards in the windows of all parts; samples
    times = 2 if mixture is None else 8  # 2,048 positions hold the shares of a mixture exactly

    def read(number):
        cache = ShardCache(tmp_path / f"cache {number}", capacity=1e9)
        datasets = [ShardDataset(folder, "train", cache=cache) for folder in folders]
        cache.capacity = 1.01 * span * max(shard.bytes for each in datasets for shard in each.shards)
        stream, numbers = Stream(datasets, config, seed=0), []
        for step in range(times * 256 // batch):
            drawn = stream.numbers((2 * step + number) * batch // 2, batch // 2, batch=batch).tolist()
            for sample in drawn[:: 8 if mixture else 1]:
                stream.read(sample, step, decode=lambda picture: picture, captioned=True)
            assert on_disk(cache.folder) <= cache.capacity
            numbers += drawn
        return numbers

    halves = in_processes(partial(read, 0), partial(read, 1))
    assert sorted([*halves[0], *halves[1]]) == sorted([*range(256)] * times)
    size = sum(path.stat().st_size for path in (tmp_path / "elsewhere").rglob("*.tar"))
    # Less where an epoch begins with what the one before ended with; the windows after the end were fetched ahead.
    assert 1 <= sum(web.sent.values()) / size <= times + span / 32


def test_the_next_window_is_fetched_before_it_is_needed(tmp_path, web):
    """While samples of this one are read, and no more is held than fits."""
    dataset = elsewhere(tmp_path, web, [8] * 12)
    stream = grouped_stream(dataset.folder, dataset.cache, window=3, groups=1)
    stream.numbers(0, 4, batch=8)
    wait_for(lambda: len(web.sent) == 6)
    first = set(web.sent)
    second = {dataset.shards[dataset.shard_of(n)].name for n in grouped_numbers(stream, 24, 24)}
    assert second < first
    wait_for(lambda: not list(dataset.cache.folder.glob(".*.tmp")))
    assert len(list(dataset.cache.folder.glob("*.tar"))) == 6


def grouped_numbers(stream, start, count):
    """Samples by position alone."""
    return epochs(np.arange(start, start + count), stream.sources[0].sizes, 0, window=3, groups=1).tolist()


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
