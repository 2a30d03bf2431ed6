"""The reference recipe at a size of seconds: params.yaml with small numbers, every section and key kept."""

import hashlib
import json
import subprocess
import time
from collections.abc import Callable
from copy import deepcopy
from functools import lru_cache
from pathlib import Path
from typing import Any

from vtp.config import read_yaml
from vtp.params import write_yaml

ROOT = Path(__file__).parents[1]

# The record of a convolutional tokenizer.
CONVOLUTIONAL: dict[str, Any] = {
    "name": "convolutional",
    "image_size": 16,
    "channels": [4, 8, 8],
    "residual_blocks": 1,
    "attention_levels": 1,
    "norm_groups": 4,
    "latent_channels": 3,
}
SMALL: dict[str, Any] = {
    "prepare_data": {
        "source": {"image_size": 16, "classes": 6, "train_samples": 64, "validation_samples": 32},
        "samples_per_shard": 48,
    },
    "reference": {"image_size": 16, "batch_size": 20, "splits": {"train": {"samples": 40, "kept": 30}}},
    "pretrain": {
        "tokenizer": {
            "image_size": 16,
            "vision": {"patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2, "feature_bottleneck": 8},
            "decoder": {"embed_dim": 16, "depth": 1, "num_heads": 2},
            "text": {"embed_dim": 16, "depth": 1, "num_heads": 2},
        },
        "data": {
            "batch": {"clip": 8, "ssl": 4, "reconstruction": 2},
            "clip_view": {"size": 16},
            "ssl_views": {"global_size": 16, "local_size": 8, "local_views": 2},
        },
        "objective": {"ssl": {"head": {"hidden_dim": 16, "bottleneck_dim": 8, "prototypes": 16}}},
        "training": {"length": {"name": "samples", "samples": 96}, "log_every": 2},
        "monitor": {
            "evaluations": 3,
            "pictures": 3,
            "probe": {"train_samples": 20, "test_samples": 10, "neighbours": 3},
            "milestones": [1.0e8],
        },
    },
    "tune_decoder": {
        "batch_size": 4,
        "adversary": {"discriminator": {"name": "patch", "width": 4, "depth": 2}},
        "training": {"length": {"name": "samples", "samples": 48}, "log_every": 2},
        "monitor": {"evaluations": 2, "samples": 6, "pictures": 3, "batch_size": 4},
    },
    "cache_latents": {"batch_size": 16, "shard_size": 20, "horizontal_flips": True, "statistics": {"images": 40}},
    "train_generator": {
        "batch_size": 8,
        "model": {"size": {"name": "own", "hidden_size": 16, "depth": 1, "num_heads": 2}, "patch_size": 1},
        "training": {"length": {"name": "samples", "samples": 96}, "log_every": 2},
        "monitor": {
            "evaluations": 2,
            "validation": 10,
            "pictures": 3,
            "sampler": {"steps": 2},
            "batch_size": 8,
        },
    },
    "generate": {
        "samples": 24,
        "batch_size": 10,
        "shard_size": 20,
        "settings": {"unguided": {"steps": 2}, "guided": {"steps": 2}},
    },
    "evaluate_understanding": {
        "batch_size": 16,
        "train_samples": 40,
        "probes": {
            "resize": 16,
            "size": 16,
            "blocks": [1, 2],
            "single": {"name": "lbfgs", "l2": [1e-3, 1e-2], "max_iterations": 5},
            "multi": {"epochs": 2, "batch_size": 16},
        },
    },
    "evaluate_reconstruction": {
        "batch_size": 20,
        "pictures": 3,
        "noise": {"levels": [0.0, 0.2], "samples": 24},
        "speed": {"warmup": 0, "batches": 1},
    },
    "evaluate_generator": {
        "counts": [24],
        "batch_size": 20,
        "kernel": {"subsets": 3, "subset_size": 20},
        "pictures_per_class": 2,
        "pictured_classes": 3,
    },
}


def tiny_params(params: Path = ROOT / "params.yaml") -> dict[str, Any]:
    """All sections of `params` at tiny size."""
    return merged(deepcopy(_sections(params)), SMALL)


@lru_cache
def _sections(params: Path) -> dict[str, Any]:
    """Read once: parsing takes a tenth of a second."""
    return read_yaml(params)


def merged(values: dict[str, Any], changes: dict[str, Any], *, new: bool = False) -> dict[str, Any]:
    """`values` with nested `changes`; a union member is replaced as a whole, as is what is empty. `new`: keys may be."""
    result = dict(values)
    for key, change in changes.items():
        assert new or key in values, key
        before = values.get(key)
        nested = isinstance(change, dict) and isinstance(before, dict) and before and "name" not in change
        result[key] = merged(before, change, new=new) if nested else change
    return result


def write_shards(folder: Path) -> None:
    """The shards of the tiny recipe."""
    from stages.prepare_data import PrepareData
    from vtp.curation.ingest.embedded import ComposedPictures
    from vtp.curation.ingest.ingest import Ingest

    config = PrepareData.parse(tiny_params()["prepare_data"], where="test")
    source = ComposedPictures(config.source, config.image)
    Ingest(source, config, folder, folder.parent / f"{folder.name}_state").run(processes=0, progress=lambda count: None)


def damage_file(path: Path, damage: str, other: Path) -> None:
    """Exchange a file with another, cut it, flip one of its bits, or remove it."""
    content = bytearray(path.read_bytes())
    if damage == "exchange":
        path.write_bytes(other.read_bytes())
        other.write_bytes(content)
    elif damage == "truncate":
        path.write_bytes(content[:-8])
    elif damage == "flip":
        content[-3] ^= 1
        path.write_bytes(content)
    else:
        assert damage == "remove", damage
        path.unlink()


def reseal(folder: Path) -> None:
    """Digests of the shards of `folder` as its tars are now, as if they had been written so."""
    from vtp.artefact import digest

    manifest = json.loads((folder / "manifest.json").read_text())
    for split in manifest["splits"].values():
        for shard in split["shards"]:
            shard["sha256"] = digest(folder / shard["name"])
        lines = "".join(f"{shard['sha256']} {shard['name']}\n" for shard in split["shards"])
        split["digest"] = hashlib.sha256(lines.encode()).hexdigest()
    (folder / "manifest.json").write_text(json.dumps(manifest))


def write_params(values: dict[str, Any], path: Path) -> None:
    """As YAML."""
    write_yaml(path, values)


def wait_for(condition: Callable[[], object], process: subprocess.Popen, seconds: float = 300) -> None:
    """Until `condition` holds; the process must not end before."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, (process.stdout or process.stderr).read()
        assert time.monotonic() < deadline
        time.sleep(0.005)
