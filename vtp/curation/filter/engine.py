"""Filter rows of any number: passes over chunks and parts on disk, each resumable, none dependent on the files' order.

    read     chunks of the source, through the row rules that lead the list, spilled by ranges of `order`
    sort     range by range: sorted, each key once; from here on a row's place says which of two comes first
    rule     for each rule about all rows: emit, compare, drop, and the row rules that follow it
    write    files of a fixed number of rows

Everything stands in one scratch folder, a file per chunk or part and pass; what is there is not done again.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from vtp.curation.filter.columns import MetadataSource
from vtp.curation.filter.duplicates import BandJob, FirstsJob, GroupJob, group_equals, group_hashes, group_near
from vtp.curation.filter.funnel import Funnel, Tally
from vtp.curation.filter.measure_images import ImageMeasurement, LeftRows
from vtp.curation.filter.read_source import ReadJob, chunks, read_chunk
from vtp.curation.filter.row_rules import check_languages
from vtp.curation.filter.rules import (
    BestShare,
    ClipScore,
    Duplicates,
    Language,
    PerceptualDuplicates,
    RowRule,
    SetRule,
    Subset,
    TopFraction,
)
from vtp.curation.filter.set_rules import Best, DropJob, EmitJob, First, Listed, best_codes, drop_rows, emit
from vtp.curation.filter.sort_rows import SortJob, sort_part
from vtp.curation.filter.spill import span_of
from vtp.curation.filter.steps import FilterSteps, Step
from vtp.curation.filter.write_selection import plan_files, write_file
from vtp.curation.rows import KEY, ORDER, PART, ROLES
from vtp.host import Host
from vtp.processes import WorkerPool
from vtp.texts import listed


class FilterError(ValueError):
    """Too little can be read, or nothing is left; the message says what was removed."""


class _Part(NamedTuple):
    """Rows of a range of `order`, and which of them are left."""

    rows: Path
    kept: Path
    left: int


class FilterEngine:
    """Filters one source; `images` measures those of a pool, on other ranks too."""

    def __init__(
        self,
        source: MetadataSource,
        rules: Sequence[RowRule | SetRule],
        folder: Path,
        *,
        images: ImageMeasurement,
        workers: WorkerPool,
        host: Host,
    ) -> None:
        self.filter_steps = FilterSteps.of(rules)
        self._source, self._folder, self._images = source, folder, images
        self._workers, self._host = workers, host
        self._lists = folder / "lists"
        self._span = span_of(source.rows)
        self._count = -(-source.rows // self._span) or 1  # parts
        self._tallies: list[Tally] = []
        for rule in rules:
            if isinstance(rule, Language):
                check_languages(rule)

    @property
    def funnel(self) -> Funnel:
        """What was removed so far."""
        return Funnel.of(self._source.rows, self.filter_steps.names, self._tallies)

    def run(self, output: Path, *, rows_per_part: int, max_unreadable: float) -> Funnel:
        """Filter into the folder `output`. Raises FilterError when more than a share of the rows is unreadable."""
        lines, images = self.filter_steps.lines, 0
        spills = self._read()
        bad = self.funnel.removed((lines.unreadable_text, lines.no_key))
        self._check(bad, self._source.rows, max_unreadable, "rows have no key or a text that is not UTF-8")
        parts = self._sort(spills)
        for number, step in enumerate(self.filter_steps.steps):
            images = sum(part.left for part in parts)
            folder = self._folder / f"rule-{number:02}"
            folder.mkdir(exist_ok=True)
            pieces = self._images.measure([LeftRows(*part) for part in parts], folder) if step.image_line else None
            parts = self._drop(step, parts, self._compare(step, parts, pieces, folder), folder)
            if step.image_line:
                bad = self.funnel.removed((step.image_line,))
                what = "images cannot be read (put the rule `downloaded` first if the pool holds failed downloads)"
                self._check(bad, images, max_unreadable, what)
        self._write(parts, output, rows_per_part)
        return self.funnel

    def _check(self, bad: int, rows: int, most: float, what: str) -> None:
        if bad > most * rows:
            first = [str(tuple(e)) for line in self.funnel.lines if "unreadable" in line.name for e in line.examples]
            shown = f": {listed(first, count=bad)}" if first else ""
            raise FilterError(f"{bad} of {rows} {what}, more than max_unreadable {most}{shown}")

    def _pass(self, function: Callable[[Any], None], jobs: Sequence[Any], sizes: Sequence[int], what: str) -> None:
        """Do those jobs whose file `done` is not there, with a bar over their `sizes` in rows."""
        size_of = {id(job): size for job, size in zip(jobs, sizes, strict=True)}
        missing = [job for job in jobs if not done(job).exists()]
        left = sum(size_of[id(job)] for job in missing)
        with self._host.progress(sum(sizes), what, "row", sum(sizes) - left) as bar:
            for ended in self._workers.results(function, missing):
                bar.update(sum(size_of[id(job)] for job, _ in ended))
                self._images.stop_if_requested()

    def _read(self) -> tuple[Path, ...]:
        folder = self._folder / "read"
        folder.mkdir(exist_ok=True)
        jobs, sizes = [], []
        for number, (pieces, rows) in enumerate(chunks(self._source, self._span)):
            jobs.append(
                ReadJob(
                    folder / f"{number:06}.json",
                    pieces,
                    self._source.layout,
                    self._source.schema,
                    self.filter_steps.leading,
                    self._lists,
                    self.filter_steps.lines,
                    self._span,
                    self._count,
                )
            )
            sizes.append(rows)
        self._pass(read_chunk, jobs, sizes, "reading")
        self._tallies += [Tally.load(job.done) for job in jobs]
        return tuple(path for job in jobs for path in job.spills)

    def _sort(self, spills: tuple[Path, ...]) -> list[_Part]:
        folder = self._folder / "rows"
        folder.mkdir(exist_ok=True)
        left = sum(tally.left for tally in self._tallies)
        jobs = [
            SortJob(
                folder / f"{part:06}.json",
                folder / f"{part:06}.arrow",
                folder / f"{part:06}.npy",
                spills,
                part,
                self.filter_steps.lines.duplicate_key,
            )
            for part in range(self._count if spills else 0)
        ]
        self._pass(sort_part, jobs, _shares(left, len(jobs)), "sorting")
        tallies = [Tally.load(job.done) for job in jobs]
        self._tallies += tallies
        return [_Part(job.rows, job.kept, tally.left) for job, tally in zip(jobs, tallies, strict=True)]

    def _compare(
        self, step: Step, parts: Sequence[_Part], pieces: Sequence[tuple[Path, ...]] | None, folder: Path
    ) -> list["_Verdict"]:
        """Emit what the rule compares and compare it; what it means for each part."""
        rule, sizes = step.rule, [part.left for part in parts]
        emits = [
            EmitJob(
                folder / f"gone-{number:06}.npy",
                folder / f"unreadable-{number:06}.npy",
                folder / f"emitted-{number:06}.npy",
                part.rows,
                part.kept,
                pieces[number] if pieces else (),
                rule,
                number,
                self._count,
            )
            for number, part in enumerate(parts)
        ]
        self._pass(emit, emits, sizes, step.line)
        emitted = tuple(job.emitted for job in emits)
        match rule:
            case Duplicates() | PerceptualDuplicates():
                listed = Listed(self._group(rule, emitted, folder, sum(sizes)))
                return [_Verdict(job, listed) for job in emits]
            case TopFraction() | ClipScore(keep=BestShare()):
                fraction = rule.fraction if isinstance(rule, TopFraction) else _share(rule)
                threshold, ties = best_codes(emitted, fraction)
                return [
                    _Verdict(job, Best(job.emitted, threshold, count)) for job, count in zip(emits, ties, strict=True)
                ]
            case Subset():
                before = np.cumsum([0, *sizes])[:-1].tolist()
                return [
                    _Verdict(job, First(max(0, rule.size - start))) for job, start in zip(emits, before, strict=True)
                ]
            case ClipScore():
                return [_Verdict(job, None) for job in emits]

    def _group(
        self, rule: Duplicates | PerceptualDuplicates, emitted: tuple[Path, ...], folder: Path, rows: int
    ) -> tuple[Path, ...]:
        """Lists of the rows that are not the first of their kind."""
        shares = _shares(rows, self._count)

        def group(name: str, spills: tuple[Path, ...], part: int) -> GroupJob:
            return GroupJob(folder / f"{name}-{part:06}.npy", spills, part, self._count)

        equals = [group("equal", emitted, part) for part in range(self._count if emitted else 0)]
        lists = tuple(job.done for job in equals)
        if isinstance(rule, Duplicates):
            self._pass(group_equals, equals, shares[: len(equals)], "comparing")
            return lists
        bands = range(rule.max_distance + 1 if rule.max_distance else 0)
        firsts = [
            FirstsJob(job, tuple(folder / f"band-{band:02}-{job.part:06}.npy" for band in bands)) for job in equals
        ]
        self._pass(group_hashes, firsts, shares[: len(firsts)], "comparing equal hashes")
        near = []
        for band in bands:
            spills = tuple(job.band_spills[band] for job in firsts)
            groups = [group(f"near-{band:02}", spills, job.part) for job in equals]
            near += [BandJob(job, band, rule.max_distance) for job in groups]
        self._pass(group_near, near, _shares(rows * len(bands), len(near)), "comparing near hashes")
        return lists + tuple(job.group.done for job in near)

    def _drop(self, step: Step, parts: Sequence[_Part], verdicts: Sequence["_Verdict"], folder: Path) -> list[_Part]:
        jobs = [
            DropJob(
                folder / f"{number:06}.json",
                folder / f"kept-{number:06}.npy",
                verdict.emit,
                verdict.verdict,
                step.line,
                step.image_line,
                step.following,
                self._lists,
            )
            for number, verdict in enumerate(verdicts)
        ]
        self._pass(drop_rows, jobs, [part.left for part in parts], "removing")
        tallies = [Tally.load(job.done) for job in jobs]
        self._tallies += tallies
        return [
            part._replace(kept=job.kept_after, left=tally.left)
            for part, job, tally in zip(parts, jobs, tallies, strict=True)
        ]

    def _write(self, parts: Sequence[_Part], output: Path, rows_per_part: int) -> None:
        if not sum(part.left for part in parts):
            raise FilterError(f"no row is left of {self._source.rows}:\n{self.funnel.table()}")
        output.mkdir(exist_ok=True)
        columns = (KEY, ORDER, *(role for role in ROLES if role != KEY), *self._source.layout.kept)
        jobs = plan_files(output, PART, parts, rows_per_part, columns)
        sizes = [sum(stretch.stop - stretch.start for stretch in job.stretches) for job in jobs]
        self._pass(write_file, jobs, sizes, "writing")


class _Verdict(NamedTuple):
    """What was emitted of a part, and what the comparison says about it."""

    emit: EmitJob
    verdict: Listed | Best | First | None


def done(job: Any) -> Path:  # noqa: ANN401 - a job of any pass
    """The file that is there when the job is done."""
    return job.group.done if isinstance(job, FirstsJob | BandJob) else job.done


def _share(rule: ClipScore) -> float:
    assert isinstance(rule.keep, BestShare)
    return rule.keep.fraction


def _shares(total: int, count: int) -> list[int]:
    """`total` in `count` numbers that differ by one at most."""
    return [total * (number + 1) // count - total * number // count for number in range(count)]
