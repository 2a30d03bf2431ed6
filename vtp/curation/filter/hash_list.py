"""Lists of hashes of any length, looked up on disk: sorted once into two arrays that are mapped, not read."""

from collections.abc import Iterator
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np

from vtp.artefact import ArtefactError, read_json, whole_folder, write_json
from vtp.curation.filter.digests import HEX_DIGITS, hex_prefixes
from vtp.curation.filter.spill import part_of, read_record_spill, span_of, write_record_spill

BLOCK = 1 << 20  # hashes read at a time


class Prepared(NamedTuple):
    """A list that is ready for lookups."""

    high: np.ndarray  # [n] uint64, ascending; mapped
    low: np.ndarray  # [n] uint64, ascending among equals of `high`
    digits: int  # of every hash of the list


def prepare(file: Path, folder: Path) -> None:
    """Sort a list into `folder`; nothing to do when it is there.

    Raises ArtefactError for a list that is missing, no list of hashes, or of hashes of several lengths.
    """
    if folder.exists():
        return
    if not file.is_file():
        raise ArtefactError(f"{file}: no such list of hashes; put it there or correct the rule's `file`")
    digits, total, blocks = _open(file)
    with whole_folder(folder) as temporary:
        parts = -(-total // span_of(total)) or 1
        spills = []
        for number, pairs in enumerate(blocks):
            spills.append(temporary / f"spill-{number:05d}.npy")
            write_record_spill(spills[-1], pairs, part_of(pairs[:, 0], parts), parts)
        if total:
            names = ("high", "low")
            shape = (total,)
            arrays = [np.lib.format.open_memmap(temporary / f"{n}.npy", "w+", np.uint64, shape) for n in names]
            start = 0
            for part in range(parts):
                records = read_record_spill(spills, part, parts, 2)
                records = records[np.lexsort((records[:, 1], records[:, 0]))]
                for column, array in enumerate(arrays):
                    array[start : start + len(records)] = records[:, column]
                start += len(records)
        for spill in spills:
            spill.unlink()
        write_json(temporary / "list.json", {"digits": digits, "hashes": total})


@lru_cache(maxsize=16)
def load_prepared(folder: Path) -> Prepared:
    """A list that `prepare` sorted."""
    facts = read_json(folder / "list.json")
    if facts["hashes"] == 0:
        none = np.empty(0, np.uint64)
        return Prepared(none, none, facts["digits"])
    high, low = (np.load(folder / f"{name}.npy", mmap_mode="r", allow_pickle=False) for name in ("high", "low"))
    return Prepared(high, low, facts["digits"])


def contains(listed: Prepared, texts: list[str]) -> np.ndarray:
    """Which of the texts [n] are hashes of the list; case does not matter."""
    if not len(listed.high) or not texts:
        return np.zeros(len(texts), bool)
    pairs, matches = hex_prefixes(texts, listed.digits)
    first = np.searchsorted(listed.high, pairs[:, 0], side="left")
    last = np.searchsorted(listed.high, pairs[:, 0], side="right")
    for index in np.flatnonzero(matches):
        low = listed.low[first[index] : last[index]]  # nearly always none or one
        matches[index] = bool((low == pairs[index, 1]).any())
    return matches


def _open(file: Path) -> tuple[int, int, Iterator[np.ndarray]]:
    """Digits of a hash, number of hashes, and their first 128 bits in blocks [n, 2]."""
    if file.suffix != ".npy":
        return _open_text(file)
    try:
        uids = np.load(file, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise ArtefactError(f"{file}: not an array of numbers ({error})") from None
    if uids.ndim != 1 or uids.dtype.names is None or [uids.dtype[i] for i in range(len(uids.dtype))] != ["u8", "u8"]:
        raise ArtefactError(f"{file}: expected DataComp's array of u8,u8 uids, found {uids.dtype} {uids.shape}")
    high, low = uids.dtype.names
    blocks = (uids[start : start + BLOCK] for start in range(0, len(uids), BLOCK))
    return HEX_DIGITS, len(uids), (np.stack([block[high], block[low]], axis=1) for block in blocks)


def _open_text(file: Path) -> tuple[int, int, Iterator[np.ndarray]]:
    digits, total = HEX_DIGITS, 0
    with file.open("rb") as lines:
        for line in lines:
            if line := line.strip():
                digits = digits if total else len(line)
                total += 1
    if digits < HEX_DIGITS:
        raise ArtefactError(f"{file}: hashes of {digits} digits; expected at least {HEX_DIGITS} (128 bits)")
    return digits, total, _text_blocks(file, digits)


def _text_blocks(file: Path, digits: int) -> Iterator[np.ndarray]:
    with file.open("rb") as lines:
        numbered = ((number, line.strip()) for number, line in enumerate(lines, 1) if line.strip())
        while block := list(islice(numbered, BLOCK)):
            pairs, valid = hex_prefixes([line.decode("latin-1") for _, line in block], digits)
            if not valid.all():
                number, line = block[int(np.argmin(valid))]
                raise ArtefactError(f"{file}, line {number}: {line[:40]!r} is no hexadecimal number of {digits} digits")
            yield pairs
