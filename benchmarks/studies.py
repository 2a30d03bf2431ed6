"""How long DVC takes to find that nothing is to be done in a study that compares runs.

    python -m benchmarks.studies --runs 4 --seeds 3 --points 3

A clone of this project in a temporary folder gets a study of so many points, at the size of the tests, and runs one seed
of one run of it, of which all others are copies that are committed (`dvc commit`): DVC sees as many stages, parameters and
files.
Then `dvc repro` and `dvc status` of the finished study are timed, beside `dvc version`, which is what it takes to start
DVC.
"""

import argparse
import shutil
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(
    0, str(Path(__file__).parents[1] / "tests")
)  # the recipe at a size of seconds, and a clone to run it in

from clone import Clone, Study

from vtp.params import milestone_name


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser("python -m benchmarks.studies", description=__doc__)
    parser.add_argument("--runs", type=int, default=4)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--points", type=int, default=3)
    parser.add_argument("--repeat", type=int, default=3, help="times that each command is timed; the median counts")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        study = build(Path(folder) / "clone", options.runs, options.seeds, options.points)
        stages = len(study.dvc("stage", "list", "--name-only").split())
        print(f"{stages} stages: {options.runs} runs, {options.seeds} seeds, {options.points} points, 8 stages of each")
        for command in ("repro", "status", "version"):
            seconds = sorted(timed(study, command) for _ in range(options.repeat))[options.repeat // 2]
            print(f"dvc {command:8} {seconds:6.1f} s")


def build(folder: Path, runs: int, seeds: int, points: int) -> Study:
    """`objectives` with runs that differ in their seeds, and milestones at even distances."""
    milestones = [*(round((number + 1) / points, 3) for number in range(points - 1)), "end"]
    metrics = {"base": None, "PSNR": "reconstruction.validation_centre16.tuned.psnr"}
    figure = {"base": None, "all": {"name": "curves", "x": "flops", "y": ["PSNR"], "published": None}}
    summary = {"title": "Runs", "metrics": metrics, "figure": figure, "claims": {"base": None}}
    monitor = {"milestones": milestones}
    study = Study(Clone(folder), "objectives", pretrain={"monitor": monitor})
    names = [f"run-{number}" for number in range(runs)]
    points_of = [milestone_name(milestone) for milestone in milestones]
    study.values |= {"runs": {names[0]: {}}, "seeds": [0], "points": points_of, "summary": summary}
    study.write({})
    study.dvc("repro", seconds=3600)
    for parent in (study.folder / name for name in ("work", "work/points", "plots")):
        for place in (parent / name / str(seed) for name in names for seed in range(seeds)):
            if not place.exists():
                shutil.copytree(parent / names[0] / "0", place)
    study.values["runs"] = {name: {"pretrain": {"seed": 100 * number}} for number, name in enumerate(names)}
    study.values["seeds"] = list(range(seeds))
    study.write({})
    study.dvc("repro", "check")
    study.dvc("commit", "--force", seconds=3600)
    return study


def timed(study: Study, command: str) -> float:
    """Seconds of a command that finds nothing to do."""
    start = time.perf_counter()
    output = study.dvc(command)
    assert command == "version" or "up to date" in output, output
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
