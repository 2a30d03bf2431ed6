"""Rules that look at one row at a time, over columns: which rows stay."""
# pyright: reportAttributeAccessIssue=false
# (pyarrow.compute makes its functions when it is imported.)

from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, assert_never

import numpy as np

from vtp.config import ConfigError
from vtp.curation.filter.hash_list import contains, load_prepared
from vtp.curation.filter.rules import (
    STATUS,
    AspectRatio,
    CaptionLength,
    Category,
    Downloaded,
    HashList,
    KeepOrDrop,
    Language,
    Number,
    Pattern,
    PixelSize,
    RowRule,
)
from vtp.curation.filter.values import numbers, plain_if_number, texts
from vtp.curation.rows import CAPTION, HEIGHT, WIDTH

if TYPE_CHECKING:
    import pyarrow as pa
    from py3langid.langid import LanguageIdentifier


def stays(rule: RowRule, table: "pa.Table", lists: Path) -> np.ndarray:  # noqa: PLR0911 - one a rule
    """Which rows [n] of `table` stay; `lists` is the folder of prepared lists of hashes."""
    import pyarrow.compute as pc

    match rule:
        case Downloaded():
            return _decided(pc.equal(_column(table, STATUS), "success"), "drop")
        case PixelSize():
            return _size(rule, table)
        case AspectRatio():
            width, height = _sides(table)
            longer, shorter = _extreme(pc.max_element_wise, width, height), _extreme(pc.min_element_wise, width, height)
            # By multiplication: a side of 0 is no division.
            fits = pc.less_equal(longer.cast("float64"), pc.multiply(shorter.cast("float64"), rule.max))
            return _decided(pc.and_(fits, pc.greater(shorter, 0)), rule.missing)
        case CaptionLength():
            return _caption_length(rule, table)
        case Language():
            return _language(rule, table)
        case Number():
            values = numbers(_column(table, rule.column))
            return _decided(_between(values, rule.min, rule.max), rule.missing)
        case Category():
            return _category(rule, table)
        case Pattern():
            matches = pc.match_substring_regex(_column(table, rule.column), rule.regex)
            return _decided(matches if rule.matches == "keep" else pc.invert(matches), rule.missing)
        case HashList():
            return _hash_list(rule, table, lists)
    assert_never(rule)


def check_languages(rule: Language) -> None:
    """Raises ConfigError for a code that the detector does not know: nothing would ever pass."""
    known = sorted(set(_identifier().labels))
    if unknown := [code for code in rule.allowed if code not in known]:
        raise ConfigError(f"rule language: no language {', '.join(unknown)}; there are {', '.join(known)}")


def _column(table: "pa.Table", name: str) -> "pa.Array":
    import pyarrow as pa

    column = table[name].combine_chunks()
    return column.cast(pa.string()) if pa.types.is_null(column.type) else column


def _decided(passes: "pa.Array", missing: KeepOrDrop) -> np.ndarray:
    return passes.fill_null(missing == "keep").to_numpy(zero_copy_only=False)


def _between(values: "pa.Array", least: float | None, most: float | None) -> "pa.Array":
    """Null where the value is."""
    import pyarrow.compute as pc

    passes = pc.is_valid(values) if least is None else pc.greater_equal(values, least)
    passes = pc.if_else(pc.is_valid(values), passes, None)
    return passes if most is None else pc.and_(passes, pc.less_equal(values, most))


def _sides(table: "pa.Table") -> tuple["pa.Array", "pa.Array"]:
    return _column(table, WIDTH).cast("int64"), _column(table, HEIGHT).cast("int64")


def _extreme(function, width: "pa.Array", height: "pa.Array") -> "pa.Array":  # noqa: ANN001 - a function of arrow's
    return function(width, height, skip_nulls=False)


def _size(rule: PixelSize, table: "pa.Table") -> np.ndarray:
    import pyarrow.compute as pc

    width, height = _sides(table)
    least = _between(_extreme(pc.min_element_wise, width, height), rule.min_side, None)
    most = _between(_extreme(pc.max_element_wise, width, height), None, rule.max_side)
    area = _between(pc.multiply(width, height), rule.min_area, rule.max_area)
    return _decided(pc.and_(pc.and_(least, most), area), rule.missing)


def _caption_length(rule: CaptionLength, table: "pa.Table") -> np.ndarray:
    import pyarrow.compute as pc

    captions = _column(table, CAPTION)
    passes = _between(pc.utf8_length(captions), rule.min_characters, rule.max_characters)
    if rule.min_words is not None or rule.max_words is not None:
        trimmed = pc.utf8_trim_whitespace(captions)
        words = pc.list_value_length(pc.utf8_split_whitespace(trimmed))
        words = pc.if_else(pc.equal(trimmed, ""), 0, words)  # which splits into one empty word
        passes = pc.and_(passes, _between(words, rule.min_words, rule.max_words))
    return _decided(passes, rule.missing)


def _language(rule: Language, table: "pa.Table") -> np.ndarray:
    import pyarrow as pa

    classify, allowed = _identifier().classify, set(rule.allowed)
    verdicts: list[bool | None] = []
    for text in _column(table, CAPTION).to_pylist():
        language, probability = classify(text) if text is not None else (None, 0.0)
        verdicts.append(None if text is None else language in allowed and probability >= rule.min_probability)
    return _decided(pa.array(verdicts, pa.bool_()), rule.missing)


@lru_cache(maxsize=1)
def _identifier() -> "LanguageIdentifier":
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)


def _category(rule: Category, table: "pa.Table") -> np.ndarray:
    import pyarrow as pa
    import pyarrow.compute as pc

    column = _column(table, rule.column)
    names, _ = texts(column)
    allowed = map(plain_if_number, rule.allowed) if pa.types.is_decimal(column.type) else rule.allowed
    is_allowed = pc.is_in(names, pa.array(allowed, pa.string()))
    return _decided(pc.if_else(pc.is_valid(names), is_allowed, None), rule.missing)


def _hash_list(rule: HashList, table: "pa.Table", lists: Path) -> np.ndarray:
    hashes, _ = texts(_column(table, rule.column))
    valid = hashes.is_valid().to_numpy(zero_copy_only=False)
    listed = contains(load_prepared(prepared_list(lists, rule.file)), hashes.fill_null("").to_pylist())
    return np.where(valid, listed == (rule.action == "allow"), rule.missing == "keep")


def prepared_list(lists: Path, file: str) -> Path:
    """Where the sorted form of a list lies."""
    return lists / file.replace("/", "%2F")
