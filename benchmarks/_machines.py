"""Machines that train on shards of a slow store, side by side: the bytes that move, and the share of time that is waited.

Each machine is a process with a folder of its own and one worker; a step takes a fixed time, as that of a GPU does. Ours
stands beside webdataset, which streams tars, and litdata, which fetches chunks of its own format; both get the same files.
"""

import os
import shutil
import time
import urllib.request
from collections.abc import Callable, Iterator
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from benchmarks._pictures import write_pictures
from benchmarks._slow_store import SlowStore, slow_store
from stages.runner.environment import LocalHost, Runtime
from vtp.artefact import read_json, write_json
from vtp.data.batches import RankSlice
from vtp.data.dataset import ShardDataset
from vtp.data.loader import load_batches
from vtp.data.remote import ShardCache
from vtp.data.stream import Stream, StreamConfig

MACHINES, SHARDS, WINDOW, BATCH = 2, 64, 4, 64
USED = 0.6  # share of the line that the machines need when the data move once between them


class Sizes(NamedTuple):
    """Sizes [n] of the files of a batch."""

    bytes: Tensor


class FileBatches(Dataset[Sizes]):
    """The image files of a rank's part of each step, as they lie in the shards."""

    def __init__(self, stream: Stream, rank_slice: RankSlice) -> None:
        self.stream = stream
        self.rank_slice = rank_slice

    def __getitem__(self, index: int) -> Sizes:
        step, rows = self.rank_slice.of(BATCH, index)
        numbers = self.stream.numbers(step * BATCH + rows.start, len(rows), batch=BATCH)
        return Sizes(torch.tensor([len(self.stream.sources[0].content(number)) for number in numbers.tolist()]))


Batches = Iterator[object]
Loader = Callable[[Path, str, Path, int, int], Batches]  # data, URL of them or nothing, cache, rank, ranks


def ours(data: Path, url: str, cache: Path, rank: int, ranks: int) -> Batches:
    """Groups of shards, fetched ahead."""
    size = sum(path.stat().st_size for path in data.glob("*.tar"))
    held = ShardCache(cache, capacity=2.2 * size * WINDOW / SHARDS if url else size)
    folder = cache.parent / f"manifest {cache.name}"
    folder.mkdir()
    for path in data.glob("*.parquet"):
        shutil.copy(path, folder)
    write_json(folder / "manifest.json", read_json(data / "manifest.json") | {"location": url or f"file://{data}"})
    config = StreamConfig(samples=None, window=WINDOW, groups=MACHINES, mixture=None, decode="full", max_replaced=0.0)
    stream = Stream([ShardDataset(folder if url else data, "train", cache=held)], config, seed=0)
    host = LocalHost(cache, cache, Runtime.of({"VTP_DEVICE": "cpu", "VTP_WORKERS": "1"}))
    return load_batches(FileBatches(stream, RankSlice(rank, ranks, 1)), range(10**9), host)


def theirs_webdataset(data: Path, url: str, cache: Path, rank: int, ranks: int) -> Batches:
    """Shards are split by node and streamed; a buffer of samples is shuffled."""
    import webdataset

    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(ranks)}
    urls = [f"{url}/{path.name}" if url else str(path) for path in sorted(data.glob("*.tar"))]
    dataset = webdataset.WebDataset(urls, shardshuffle=len(urls), seed=0, nodesplitter=webdataset.split_by_node)
    samples = dataset.shuffle(512).to_tuple("jpg", "txt").repeat().batched(BATCH // ranks)
    return iter(DataLoader(samples, batch_size=None, num_workers=1, prefetch_factor=4))


def theirs_litdata(data: Path, url: str, cache: Path, rank: int, ranks: int) -> Batches:
    """Chunks are assigned to nodes and fetched two ahead. Raises ImportError without the package."""
    import litdata
    from litdata.streaming import downloader
    from litdata.streaming.resolver import Dir

    class Web(downloader.Downloader):
        def download_file(self, remote_chunkpath: str, local_chunkpath: str) -> None:
            if not os.path.exists(local_chunkpath):
                temporary = self._temp_download_path(local_chunkpath)
                urllib.request.urlretrieve(remote_chunkpath, temporary)
                self._publish_file(temporary, local_chunkpath)

    downloader.register_downloader("http://", Web, overwrite=True)
    os.environ |= {"GLOBAL_RANK": str(rank), "WORLD_SIZE": str(ranks), "NNODES": str(ranks)}
    chunks = data / "litdata"
    place = Dir(path=str(cache), url=f"{url}/litdata") if url else str(chunks)
    dataset = litdata.StreamingDataset(
        place, shuffle=True, seed=0, drop_last=True, index_path=str(chunks / "index.json")
    )
    options = {"num_workers": 1, "prefetch_factor": 4, "collate_fn": _lengths}
    loader = litdata.StreamingDataLoader(dataset, batch_size=BATCH // ranks, **options)

    def endless() -> Batches:
        while True:
            yield from loader

    return endless()


def _lengths(samples: list) -> Tensor:
    """What a worker of litdata hands over; whole files it could only as tensors."""
    return torch.tensor([len(sample[0]) for sample in samples])


LOADERS: dict[str, Loader] = {"ours": ours, "webdataset": theirs_webdataset, "litdata": theirs_litdata}


def compare(folder: Path, *, samples: int = 8192, seconds: float = 16.0) -> Iterator[str]:
    """Lines of what each loader does: local files as fast as they come, then two machines on the slow store for an epoch."""
    data = write_pictures(folder / "data", side=192, count=samples, shards=SHARDS)
    loaders = dict(LOADERS)
    try:
        _write_chunks(data)
    except ImportError as error:
        del loaders["litdata"]
        yield f"litdata is left out: {error}; pip install -c constraints.txt litdata"
    size = sum(path.stat().st_size for path in data.glob("*.tar"))
    rate, step = size / (USED * seconds), seconds * BATCH / samples
    yield f"{samples} samples, {size / 1e6:.0f} MB in {SHARDS} shards, windows of {WINDOW}; one worker"
    for name, loader in loaders.items():
        (took, _, count), *_ = _run(loader, data, "", folder / f"{name} local", 1, samples // BATCH, 0.0)
        yield f"  {name:12}{count / took:10,.0f} samples/s from local files"
    yield f"{MACHINES} machines, steps of {step:.3f} s, the store sends {rate / 1e6:.1f} MB/s, used to {USED:.0%} at best"
    for name, loader in loaders.items():
        with slow_store(data, rate=rate) as store:
            runs = _run(loader, data, store.url, folder / name, MACHINES, samples // BATCH, step)
        files = [*(data / "litdata").glob("*.bin")] if name == "litdata" else [*data.glob("*.tar")]
        yield _line(name, store, sum(path.stat().st_size for path in files), runs)


def _line(name: str, store: SlowStore, size: int, runs: list[tuple[float, float, int]]) -> str:
    waited = max(wait / took for took, wait, _ in runs)
    moved = sum(store.sent.values())
    return (
        f"  {name:12}{moved / 1e6:8.1f} MB moved, {moved / size:.2f} times the data; {waited:6.1%} of the time waited"
    )


def _run(
    loader: Loader, data: Path, url: str, cache: Path, ranks: int, steps: int, step: float
) -> list[tuple[float, float, int]]:
    """Seconds, those of them that were waited, and samples, of every machine."""
    context = get_context("fork")
    queue = context.Queue()

    def machine(rank: int) -> None:
        place = cache.with_name(f"{cache.name} {rank}")
        place.mkdir()
        try:
            queue.put(_train(loader(data, url, place, rank, ranks), steps, step, BATCH // ranks))
        except Exception as error:
            queue.put(error)
        queue.close()
        queue.join_thread()
        os._exit(0)  # without the farewells of loaders that have no end

    machines = [context.Process(target=machine, args=(rank,)) for rank in range(ranks)]
    for each in machines:
        each.start()
    answers = [queue.get(timeout=300) for _ in machines]
    for each in machines:
        each.join()
    for answer in answers:
        if isinstance(answer, Exception):
            raise answer
    return answers


def _train(batches: Batches, steps: int, step: float, rows: int) -> tuple[float, float, int]:
    waited, begin = 0.0, time.monotonic()
    for _ in range(steps):
        asked = time.monotonic()
        next(batches)
        waited += time.monotonic() - asked
        time.sleep(step)
    return time.monotonic() - begin, waited, steps * rows


def _write_chunks(data: Path) -> None:
    """The same samples as chunks of litdata, as large as the shards."""
    from litdata.streaming.writer import BinaryWriter

    source = ShardDataset(data, "train")
    writer = BinaryWriter(str(data / "litdata"), chunk_size=len(source) // SHARDS)
    for number in range(len(source)):
        writer[number] = (source.content(number), source.caption(number))
    writer.done()
    writer.merge()
