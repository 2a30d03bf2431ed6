"""Metadata with all its faults, the stage filter on it, and the same filter written plainly, a row at a time."""

import hashlib
import io
import re
import tarfile
from collections import Counter
from contextlib import nullcontext
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from stages.filter import Filter, run
from stages.runner.environment import LocalHost, Runtime
from vtp.artefact import read_json
from vtp.curation.rows import ROLES as ALL_ROLES
from vtp.curation.rows import order_of

WORDS = ["a", "dog", "on", "the", "beach", "stock", "photo", "ein", "Hund", "\u3000", "größe", ""]
SCHEMA = pa.schema(
    {
        "uid": pa.string(),
        "url": pa.string(),
        "text": pa.string(),
        "original_width": pa.int64(),
        "original_height": pa.int64(),
        "sha256": pa.string(),
        "score": pa.float32(),
        "nsfw": pa.string(),
    }
)
ROLES = {"uid": "key", "url": "url", "text": "caption", "original_width": "width", "original_height": "height"}


def random_rows(count, seed=0):
    """Rows as DataComp has them; values repeat, and any but the key may be missing."""
    draws = np.random.default_rng(seed)

    def maybe(value):
        return None if draws.random() < 0.1 else value

    rows = []
    for _ in range(count):
        row = {
            "uid": f"{draws.integers(count * 4):032x}",
            "url": maybe(f"http://host/{draws.integers(count)}"),
            "text": maybe(" ".join(draws.choice(WORDS, draws.integers(0, 9)))),
            "original_width": maybe(int(draws.integers(0, 900))),
            "original_height": maybe(int(draws.integers(0, 900))),
            "sha256": maybe(f"{draws.integers(count):064X}"),
            "score": maybe(float(np.float32(draws.choice([draws.normal(), draws.integers(-2, 3), np.nan])))),
            "nsfw": maybe(str(draws.choice(["UNLIKELY", "UNSURE", "NSFW"]))),
        }
        rows.append(row)
    return rows


def write(rows, path, schema=SCHEMA, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows, schema), path, **options)


def section(rules, **changes):
    values = {
        "columns": {"name": "datacomp"},
        "keep_columns": ["score"],
        "rules": rules,
        "rows_per_part": 200,
        "max_unreadable": 0.2,
    }
    return Filter.parse(values | changes, where="params.yaml:filter")


def sift(config, rows, folder, *, processes=0, **inputs):
    """Run the stage's body; its folder of outputs `selection`, `funnel`, `examples`."""
    host = QuietHost(folder / "scratch" / "folder", folder, Runtime(processes=processes))
    host.folder.mkdir(parents=True, exist_ok=True)
    outputs = {name: folder / name for name in ("selection", "funnel", "examples")}
    run(config, rows=rows, **inputs, **outputs, host=host)
    return folder


class QuietHost(LocalHost):
    """Without bars."""

    def progress(self, total, description, unit, done=0):
        return nullcontext(SimpleNamespace(update=lambda count: None))


def selected(folder):
    return pa.concat_tables(pq.read_table(path) for path in sorted((folder / "selection").glob("*"))).to_pylist()


def removed(folder):
    """Removed rows, by the funnel's line without its number; lines of one name together."""
    total = Counter()
    for name, count in read_json(folder / "funnel")["filter"]["removed"].items():
        total[name[3:]] += count
    return total


def by_role(row):
    """A row as the output names it."""
    new = {ROLES.get(name, name): value for name, value in row.items()}
    new["sha256"] = new["sha256"] and new["sha256"].lower()
    return new | {"order": int(order_of([new["key"]])[0])}


def plainly(rows, rules):
    """What a filter should leave: rows by role, in their order."""
    rows = [by_role(row) for row in rows]
    leading = next((i for i, rule in enumerate(rules) if rule["name"] in SETS), len(rules))
    for rule in rules[:leading]:
        rows = [row for row in rows if passes(rule, row)]
    read = {rule.get("column") for rule in rules}

    def content(row):
        known = {name: value for name, value in ordered(row).items() if name != "nsfw" or name in read}
        roles = {name: known[name] for name in (*ALL_ROLES, "order")}
        return [hashlib.blake2b(repr(values).encode(), digest_size=16).digest() for values in (roles, known)]

    rows.sort(key=lambda row: (row["order"], row["key"], content(row)))
    rows = first_of(rows, "key")
    for rule in rules[leading:]:
        rows = SETS[rule["name"]](rule, rows) if rule["name"] in SETS else [row for row in rows if passes(rule, row)]
    return rows


def ordered(row):
    names = ["key", "order", "url", "caption", "width", "height", "sha256", "score"]
    return {name: row[name] for name in [*names, *(name for name in sorted(row) if name not in names)]}


def first_of(rows, name, missing="keep"):
    seen, left = set(), []
    for row in rows:
        if row[name] is None and missing == "keep":
            left.append(row)
        elif row[name] is not None and row[name] not in seen:
            seen.add(row[name])
            left.append(row)
    return left


def best(rule, rows):
    known = [row for row in rows if not absent(row[rule["column"]])]
    sign = -1 if rule["best"] == "highest" else 1
    count = int(Fraction(str(rule["fraction"])) * len(known))
    chosen = {row["key"] for row in sorted(known, key=lambda row: sign * row[rule["column"]])[:count]}
    kept = rule["missing"] == "keep"
    return [row for row in rows if row["key"] in chosen or (kept and absent(row[rule["column"]]))]


SETS = {
    "duplicates": lambda rule, rows: first_of(rows, rule["by"], rule["missing"]),
    "top_fraction": best,
    "subset": lambda rule, rows: rows[: rule["size"]],
}


def absent(value):
    return value is None or (isinstance(value, float) and np.isnan(value))


def within(value, least, most):
    return (least is None or value >= least) and (most is None or value <= most)


def passes(rule, row):  # noqa: PLR0911
    """One row rule on one row by role."""
    name, column = rule["name"], rule.get("column")
    width, height = row["width"], row["height"]
    if name in ("size", "aspect_ratio"):
        if width is None or height is None:
            return rule["missing"] == "keep"
        if name == "aspect_ratio":
            return min(width, height) > 0 and max(width, height) <= rule["max"] * min(width, height)
        area = within(width * height, rule["min_area"], rule["max_area"])
        return area and within(min(width, height), rule["min_side"], None) and max(width, height) <= rule["max_side"]
    value = row["caption" if name == "caption_length" else column]
    if absent(value):
        return rule["missing"] == "keep"
    if name == "caption_length":
        words = within(len(value.split()), rule["min_words"], rule["max_words"])
        return words and within(len(value), rule["min_characters"], rule["max_characters"])
    if name == "number":
        return within(value, rule["min"], rule["max"])
    if name == "category":
        return value in rule["allowed"]
    assert name == "pattern"
    return bool(re.search(rule["regex"], value)) == (rule["matches"] == "keep")


POOL_SCHEMA = pa.schema(
    {name: pa.string() for name in ("key", "url", "caption")}
    | {"width": pa.int32(), "height": pa.int32(), "sha256": pa.string(), "order": pa.uint64()}
    | {"status": pa.string(), "error": pa.string(), "tar": pa.string(), "offset": pa.int64(), "size": pa.int64()}
    | {"stored_width": pa.int32(), "stored_height": pa.int32()}
)


def write_pool(folder: Path, pictures):
    """A pool of (key, caption, bytes); None for bytes: the download failed."""
    (folder / "tars").mkdir(parents=True)
    rows, tar = [], folder / "tars" / "0.tar"
    with tarfile.open(tar, "w", format=tarfile.USTAR_FORMAT) as file:
        for key, caption, content in pictures:
            row = {"key": key, "url": f"http://host/{key}", "caption": caption, "status": "failed", "error": "http 404"}
            if content is not None:
                info = tarfile.TarInfo(f"{key}.jpg")
                info.size = len(content)
                place = {"tar": "tars/0.tar", "offset": file.offset + 512, "size": len(content)}
                row |= {"status": "success", "error": None, "width": 64, "height": 64} | place
                file.addfile(info, io.BytesIO(content))
            rows.append(row | {"order": int(order_of([key])[0])})
    rows.sort(key=lambda row: (row["order"], row["key"]))
    write(rows, folder / "part-00000.parquet", POOL_SCHEMA)
    return folder
