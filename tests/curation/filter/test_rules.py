"""Each rule against its own words, one row at a time; records of rules refuse what could do nothing."""

import hashlib
import re

import numpy as np
import pyarrow as pa
import pytest
from pydantic import TypeAdapter
from sifting import by_role, passes, random_rows

from vtp.artefact import ArtefactError
from vtp.config import Config, ConfigError
from vtp.curation.filter.hash_list import contains, load_prepared, prepare
from vtp.curation.filter.row_rules import check_languages, prepared_list, stays
from vtp.curation.filter.rules import HashList, Language, Rule, label, needs

BOUNDS = {"min_side": None, "max_side": 700, "min_area": None, "max_area": None}
WORDS = {"min_words": 2, "max_words": 6, "min_characters": None, "max_characters": 25}
RULES = [
    {"name": "size", **BOUNDS, "min_side": 100, "missing": "drop"},
    {"name": "size", **BOUNDS, "min_area": 40_000, "max_area": 90_000, "missing": "keep"},
    {"name": "aspect_ratio", "max": 1.5, "missing": "drop"},
    {"name": "caption_length", **WORDS, "missing": "keep"},
    {"name": "caption_length", **WORDS, "min_words": None, "max_words": None, "min_characters": 5, "missing": "drop"},
    {"name": "number", "column": "score", "min": 0.0, "max": 1.0, "missing": "drop"},
    {"name": "number", "column": "score", "min": None, "max": -0.5, "missing": "keep"},
    {"name": "number", "column": "width", "min": 300, "max": None, "missing": "keep"},
    {"name": "category", "column": "nsfw", "allowed": ["UNLIKELY"], "missing": "drop"},
    {"name": "category", "column": "nsfw", "allowed": ["UNSURE", "NSFW"], "missing": "keep"},
    {"name": "pattern", "column": "caption", "regex": "(?i)HUND|beach$", "matches": "keep", "missing": "drop"},
    {"name": "pattern", "column": "url", "regex": "[13579]$", "matches": "drop", "missing": "keep"},
]
ROWS = [by_role(row) for row in random_rows(2000, seed=1)]
TABLE = pa.Table.from_pylist([{name: value for name, value in row.items() if name != "order"} for row in ROWS])


class Wrapped(Config):
    rule: Rule


def rule_of(values):
    return Wrapped.parse({"rule": values}, where="params.yaml:filter").rule


@pytest.mark.parametrize("values", RULES, ids=[f"{i}-{rule['name']}" for i, rule in enumerate(RULES)])
def test_row_rules(values, tmp_path):
    rule = rule_of(values)
    found = stays(rule, TABLE.select([need.column for need in needs(rule)]), tmp_path)
    expected = [passes(values, row) for row in ROWS]
    assert found.tolist() == expected
    assert 0 < sum(expected) < len(expected)


def test_downloaded(tmp_path):
    status = pa.table({"status": ["success", "failed", None]})
    assert stays(rule_of({"name": "downloaded"}), status, tmp_path).tolist() == [True, False, False]


def test_language(tmp_path):
    captions = [
        "a photograph of a dog on the beach",
        "ein Bild von einem Hund auf der Straße",
        "une maison à la mer",
        None,
    ]
    table = pa.table({"caption": captions})

    def found(allowed, probability, missing="drop"):
        values = {"allowed": allowed, "min_probability": probability, "missing": missing}
        return stays(rule_of({"name": "language", **values}), table, tmp_path).tolist()

    assert found(["en"], 0.5) == [True, False, False, False]
    assert found(["de", "fr"], 0.2, "keep") == [False, True, True, True]
    assert found(["en"], 1.0) == [False] * 4
    with pytest.raises(ConfigError, match="no language xx; there are .*en"):
        check_languages(Language(name="language", allowed=["en", "xx"], min_probability=0.0, missing="keep"))


def hashes(count, seed=0):
    return [hashlib.sha256(f"{seed} {i}".encode()).hexdigest() for i in range(count)]


@pytest.mark.parametrize("digits", [32, 40, 64])
def test_lists_in_text(tmp_path, monkeypatch, digits):
    monkeypatch.setattr("vtp.curation.filter.hash_list.BLOCK", 300)
    monkeypatch.setattr("vtp.curation.filter.hash_list.span_of", lambda rows: 64)
    listed, others = [h[:digits] for h in hashes(1000)], [h[:digits] for h in hashes(500, seed=1)]
    (tmp_path / "list.txt").write_text("\n".join([listed[0].upper(), "", *listed[1:]]) + "\n")
    prepare(tmp_path / "list.txt", prepared_list(tmp_path / "ready", "list.txt"))
    loaded = load_prepared(prepared_list(tmp_path / "ready", "list.txt"))
    asked = [listed[0], others[0], listed[1].upper(), listed[2][:-1], listed[3] + "0", "", "no hash", *others, *listed]
    expected = [True, False, True, False, False, False, False, *[False] * 500, *[True] * 1000]
    assert contains(loaded, asked).tolist() == expected
    table = pa.table({"sha256": [listed[5], others[5], None]})
    for action, missing, kept in (
        ("allow", "drop", [1, 0, 0]),
        ("block", "keep", [0, 1, 1]),
        ("allow", "keep", [1, 0, 1]),
    ):
        rule = HashList(name="hash_list", column="sha256", file="list.txt", action=action, missing=missing)
        assert stays(rule, table, tmp_path / "ready").tolist() == [bool(k) for k in kept]


def test_lists_of_datacomp(tmp_path):
    """Sorted or not; the first half of a uid may repeat."""
    pairs = np.random.default_rng(0).integers(0, 2**63, (700, 2), dtype=np.uint64)
    pairs[:50, 0] = 7
    uids = np.array([tuple(pair) for pair in pairs.tolist()], dtype="u8,u8")
    np.save(tmp_path / "subset.npy", uids)
    prepare(tmp_path / "subset.npy", tmp_path / "ready")
    texts = [f"{high:016x}{low:016x}" for high, low in pairs.tolist()]
    assert contains(load_prepared(tmp_path / "ready"), texts).all()
    assert not contains(load_prepared(tmp_path / "ready"), [f"{7:016x}{low:016x}" for low in range(50)]).any()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("short.txt", b"abc123\n", "hashes of 6 digits; expected at least 32"),
        ("odd.txt", b"a" * 32 + b"\n" + b"g" * 32 + b"\n", "odd.txt, line 2: b'ggg.* is no hexadecimal number of 32 digits"),
        ("mixed.txt", b"a" * 32 + b"\n\n" + b"a" * 64 + b"\n", "mixed.txt, line 3"),
        ("none.npy", b"no array", "not an array of numbers"),
    ],
)  # fmt: skip
def test_bad_lists_are_named(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ArtefactError, match=message):
        prepare(tmp_path / name, tmp_path / "ready")
    assert not (tmp_path / "ready").exists()
    with pytest.raises(ArtefactError, match="no such list of hashes"):
        prepare(tmp_path / "nowhere.txt", tmp_path / "ready")


def test_objects_are_not_unpickled(tmp_path):
    np.save(tmp_path / "evil.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(ArtefactError, match="not an array of numbers"):
        prepare(tmp_path / "evil.npy", tmp_path / "ready")
    np.save(tmp_path / "other.npy", np.zeros(3))
    with pytest.raises(ArtefactError, match="expected DataComp's array of u8,u8 uids, found float64"):
        prepare(tmp_path / "other.npy", tmp_path / "ready")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({**RULES[10], "regex": "(unclosed"}, r"rule\.regex: .*not a regular expression of RE2: .*missing \)"),
        ({**RULES[10], "regex": "(?=ahead)"}, "invalid perl operator"),
        ({**RULES[10], "matches": "maybe"}, "'keep' or 'drop'"),
        ({**RULES[0], "min_side": None, "max_side": None}, "all bounds are null"),
        ({**RULES[5], "min": 2.0}, "min 2.0 is above max 1.0: nothing would pass"),
        ({**RULES[3], "min_words": 9}, "min_words 9 is above max_words 6"),
        ({"name": "number", "column": "score", "min": 0.0, "missing": "keep"}, "max: Field required"),
        ({"name": "subset", "size": 0}, "greater than or equal to 1"),
        ({"name": "top", "size": 0}, "known are downloaded, size, aspect_ratio"),
        (
            {"name": "hash_list", "column": "key", "file": "../x", "action": "block", "missing": "keep"},
            "inside of the folder",
        ),
    ],
)
def test_impossible_rules_are_refused(values, message):
    with pytest.raises(ConfigError, match=message):
        rule_of(values)


def test_labels_and_schema():
    assert [label(rule_of(rule)) for rule in RULES[3:6]] == ["caption_length", "caption_length", "number_score"]
    assert re.search("RE2", str(TypeAdapter(Rule).json_schema()))
