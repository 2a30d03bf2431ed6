"""Faults by the hundred against the whole pipeline at the size of the tests: which it survives.

    python -m benchmarks.faults                                        # every family, 20 cases each
    python -m benchmarks.faults --family artefacts --seed 3 --count 200
    python -m benchmarks.faults --family artefacts --seed 3 --case 17  # that one again

A case is a function of family, seed and number. Stages run by their command lines, in forks of a process that has loaded
them, so that a case costs its own work alone; torchrun and its ranks are processes of their own. Linux only.
"""

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path
from random import Random

from benchmarks._fault_families import FAMILIES
from benchmarks._faulty import Project


def main() -> None:
    """Command line; ends with 1 where a case failed."""
    about, raw = __doc__, argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("python -m benchmarks.faults", description=about, formatter_class=raw)
    parser.add_argument("--family", choices=FAMILIES, action="append", help="one, or several times; all, if not given")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--count", type=int, default=20, help="cases per family")
    parser.add_argument("--case", type=int, help="this case alone")
    parser.add_argument("--project", type=Path, help="where the finished pipeline is, or is made and kept")
    parser.add_argument("--verbose", action="store_true", help="print every case, not only those that fail")
    options = parser.parse_args()
    cases = range(options.count) if options.case is None else [options.case]
    with tempfile.TemporaryDirectory() as folder:
        project = Project((options.project or Path(folder, "project")).resolve())
        chosen = options.family or FAMILIES
        failed = [failures(project, name, options.seed, cases, verbose=options.verbose) for name in chosen]
    raise SystemExit(any(failed))


def failures(project: Project, family: str, seed: int, cases: Sequence[int], *, verbose: bool = False) -> list[str]:
    """Try cases of a family; print and give those that failed."""
    failed = []
    for number in cases:
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
            case, problem = FAMILIES[family](project, Path(folder), Random(f"{family} {seed} {number}"))
        line = f"--family {family} --seed {seed} --case {number}: {case}: {problem or 'survived'}"
        if verbose or problem is not None:
            print(line, flush=True)
        if problem is not None:
            failed.append(line)
    print(f"{family}: tried {len(cases)}, survived {len(cases) - len(failed)}, failed {len(failed)}", flush=True)
    return failed


if __name__ == "__main__":
    main()
