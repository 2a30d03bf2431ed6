"""Numbers for the images of a pool, measured by all ranks: each takes the next piece that is missing, until there is none.

The first rank carries the filter out. It says which images are left, takes its part, and waits for the files of the
others; those wait for its next word. None of them waits in a collective, which would end after a time: a rule about all
rows may take hours. A piece is a function of the rows before it, so any number of ranks may go on with what others left.
"""

import json
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import NamedTuple

from vtp.curation.filter.image_rules import ImageJob, hash_images
from vtp.curation.filter.rules import ClipScore, ImageRule
from vtp.curation.filter.score_images import Scorer, score_images
from vtp.distributed import Board, ranks
from vtp.host import Host
from vtp.processes import WorkerDied, WorkerPool

PIECE = 1024  # images of a file, or a batch if that is more
POLL_SECONDS = 0.2
END = "end"
STOP = "stop"


class LeftRows(NamedTuple):
    """Rows that are left of a part."""

    rows: Path
    kept: Path
    left: int


class ImageMeasurement:
    """What a rank does for the image rules of a filter; `pool` is the folder of the images' tars."""

    def __init__(
        self,
        rules: Sequence[ImageRule],
        *,
        pool: Path,
        outside_links: bool,
        build_scorer: Callable[[ClipScore], Scorer],
        workers: WorkerPool,
        host: Host,
    ) -> None:
        self._rules, self._pool, self._outside_links = rules, pool, outside_links
        self._build_scorer, self._workers, self._host = build_scorer, workers, host
        self._board = Board()
        self._asked = 0  # rules

    def measure(self, parts: Sequence[LeftRows], folder: Path) -> list[tuple[Path, ...]]:
        """Hashes or scores for the next of the rules: the files of each part, [n, 2] uint64 of values and states.

        The first rank's. Raises WorkerDied when the others are not heard of for the longest time that a rank may take.
        """
        number, self._asked = self._asked, self._asked + 1
        jobs = self._jobs(self._rules[number], parts, folder)
        done = sum(job.images for of_part in jobs for job in of_part if job.done.exists())
        texts = [(str(part.rows), str(part.kept), part.left) for part in parts]
        self._board.post(f"rule {number}", json.dumps([str(folder), texts]))
        self._share(number, jobs, done)
        return [tuple(job.done for job in of_part) for of_part in jobs]

    def end(self) -> None:
        """Let the other ranks go."""
        self._board.post(END, "")

    def follow(self) -> None:
        """What the other ranks do: measure with the first, until it lets them go."""
        for number, rule in enumerate(self._rules):
            folder, texts = json.loads(self._hear(f"rule {number}"))
            parts = [LeftRows(Path(rows), Path(kept), left) for rows, kept, left in texts]
            self._share(number, self._jobs(rule, parts, Path(folder)), 0)
        self._hear(END)

    def stop_if_requested(self) -> None:
        """Of all ranks when one is asked to."""
        if self._host.stop_requested or self._board.read(STOP) is not None:
            self._board.post(STOP, "")
            self._host.stop()

    def _hear(self, name: str) -> str:
        while (text := self._board.read(name)) is None:
            self._pause()
        return text

    def _pause(self) -> None:
        self.stop_if_requested()
        time.sleep(POLL_SECONDS)

    def _jobs(self, rule: ImageRule, parts: Sequence[LeftRows], folder: Path) -> list[list[ImageJob]]:
        """Of each part."""
        piece = PIECE
        if isinstance(rule, ClipScore):  # whole batches
            piece = rule.batch_size * max(1, PIECE // rule.batch_size)
        return [
            [
                ImageJob(
                    folder / f"image-{number:06}-{start:09}.npy",
                    part.rows,
                    part.kept,
                    start,
                    min(start + piece, part.left),
                    self._pool,
                    self._outside_links,
                )
                for start in range(0, part.left, piece)
            ]
            for number, part in enumerate(parts)
        ]

    def _share(self, number: int, of_parts: Sequence[Sequence[ImageJob]], done: int) -> None:
        """Measure what no other rank takes; the first goes on when all is there."""
        rule = self._rules[number]
        what = "clip scores" if isinstance(rule, ClipScore) else "image hashes"
        jobs = [job for of_part in of_parts for job in of_part]
        with self._host.progress(sum(job.images for job in jobs), what, "image", done) as bar:
            seen = 0

            def report(images: int) -> bool:
                """Images that this rank has measured; whether any rank has since the last time."""
                nonlocal seen
                before, seen = seen, self._board.add(f"images {number}", images)
                bar.update(seen - before)
                self.stop_if_requested()
                return seen > before

            self._measure(rule, self._own(number, jobs), report)
            if ranks().first:
                self._await(jobs, report)

    def _own(self, number: int, jobs: Sequence[ImageJob]) -> Iterator[ImageJob]:
        """Pieces that are missing, as this rank takes them."""
        while (place := self._board.add(f"taken {number}", 1) - 1) < len(jobs):
            if not jobs[place].done.exists():
                yield jobs[place]

    def _measure(self, rule: ImageRule, own: Iterator[ImageJob], report: Callable[[int], bool]) -> None:
        processes = self._host.rank_processes
        if isinstance(rule, ClipScore):
            first = next(own, None)
            if first is not None:
                jobs, scorer = chain([first], own), self._build_scorer(rule)
                score_images(jobs, scorer, batch_size=rule.batch_size, processes=processes, report=report)
            return
        for ended in self._workers.results(hash_images, own, most=max(1, processes)):
            report(sum(job.images for job, _ in ended))

    def _await(self, jobs: Sequence[ImageJob], report: Callable[[int], bool]) -> None:
        heard = time.monotonic()
        for number, job in enumerate(jobs):
            while not job.done.exists():
                if report(0):
                    heard = time.monotonic()
                if time.monotonic() - heard > self._host.timeout:
                    raise WorkerDied(
                        f"no rank has measured an image for {self._host.timeout:g} s, and up to {len(jobs) - number} "
                        "pieces are missing: a rank hangs, or its machine does not see the scratch folder of this one; "
                        "start again, what was measured is kept"
                    )
                time.sleep(POLL_SECONDS)
