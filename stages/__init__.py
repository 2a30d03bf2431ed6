"""The stages of the pipelines, one file each: `python -m stages.NAME FILE:SECTION ...`."""

import os

# Threads of OpenMP that wait for each other sleep: looking again and again takes the cores away from whom they wait for,
# when anything else runs beside (`benchmarks/contention.py`). libgomp reads this when torch is loaded, so it stands here.
if not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & os.environ.keys():
    os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
