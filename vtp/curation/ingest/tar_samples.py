"""The samples of a WebDataset tar: members with one key, of which one is the picture and others say something about it."""

import hashlib
import json
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, BinaryIO, Literal, NamedTuple

from pydantic import AfterValidator, Field

from vtp.config import Config
from vtp.curation.ingest.folders import EXTENSIONS
from vtp.curation.ingest.shard_workers import IngestError, Stopped
from vtp.curation.ingest.tars import members, size_of
from vtp.curation.places import read_piece
from vtp.layers.decode import DecodeError
from vtp.texts import LISTED, listed, shown, text_problem

LARGEST_TEXT = 1 << 22  # bytes of a text or of a JSON
NUMBER = re.compile(r"\d{1,18}", re.ASCII)
NEARLY = re.compile(r"[+-]?[\d.,]+(e[+-]?\d+)?|nan|[+-]?inf(inity)?", re.ASCII | re.IGNORECASE)
NO_SAMPLE = "hidden, or without an ending"  # among members that nothing reads


def _is_ending(ending: str) -> str:
    if not ending or ending.startswith(".") or "/" in ending or ending != ending.lower():
        raise ValueError("expected what stands behind the dot of a file name, in lower case, such as jpg")
    return ending


Endings = Annotated[list[Annotated[str, AfterValidator(_is_ending)]], Field(min_length=1)]


class MemberText(Config):
    """All of a member."""

    name: Literal["member"]
    endings: Endings = Field(description="endings of the member, such as [txt]; of several, a sample's first counts")


class JsonField(Config):
    """A field of a member that is a JSON object."""

    name: Literal["field"]
    endings: Endings = Field(description="endings of the member, such as [json]; of several, a sample's first counts")
    field: str = Field(description="key in the object")


class Reading(NamedTuple):
    """What is read of every sample."""

    key_ends: Literal["first_dot", "last_dot"]
    image: list[str]
    texts: dict[str, MemberText | JsonField]  # some of caption, label, class_names
    several: bool  # captions of one picture are samples of their own
    classes: int | None  # labels are numbers below it; None: any
    endings: frozenset[str]  # of all members that are read


class TarRow(NamedTuple):
    """What a sample comes to."""

    key: bytes  # names of members are bytes: not every one is UTF-8
    offset: int
    size: int
    digest: bytes  # of the picture; of the sample's place where it has none
    caption: str
    class_id: str | None
    problem: str | None  # why it cannot be used


class TarContents(Config):
    """What a tar holds besides its rows."""

    told: dict[str, int]  # samples that have an image, a caption and so on
    endings: dict[str, int]  # the most common ones of members
    ignored: dict[str, int]  # members that nothing reads, by ending
    class_names: dict[str, str]  # as samples say them


class _TarSample(NamedTuple):
    key: str
    pieces: dict[str, tuple[int, int]]  # offset and size by ending


def read_tar(path: Path, name: str, reading: Reading, stop: Callable[[], bool]) -> tuple[list[TarRow], TarContents]:
    """All samples of a tar that messages call `name`.

    Raises IngestError when it is damaged or gives a class two names, and Stopped when asked to stop.
    """
    told: Counter[str] = Counter()
    endings: Counter[str] = Counter()
    ignored: Counter[str] = Counter()
    class_names: dict[str, str] = {}
    rows: list[TarRow] = []
    with path.open("rb") as file:
        for sample in _samples(file, name, reading, endings, ignored):
            if stop():
                raise Stopped
            rows += _rows_of(sample, name, file.fileno(), reading, told, class_names)
    common = dict(endings.most_common(LISTED))
    return rows, TarContents(told=dict(told), endings=common, ignored=dict(ignored), class_names=class_names)


def _samples(
    file: BinaryIO, name: str, reading: Reading, endings: Counter[str], ignored: Counter[str]
) -> list[_TarSample]:
    """Samples in the order of their first members; what is nothing of any is counted."""
    samples: list[_TarSample] = []
    latest: dict[str, _TarSample] = {}
    for member, offset in members(Path(shown(name)), file, 0, size_of(file)):
        if (split := split_name(member.name, reading.key_ends)) is None:
            ignored[NO_SAMPLE] += 1
            continue
        key, ending = split
        endings[shown(ending)] += 1
        if ending not in reading.endings:
            ignored[shown(ending.rpartition(".")[2])] += 1
        sample = latest.get(key)
        if sample is None or ending in sample.pieces:  # members may lie apart; the same one again begins another sample
            sample = latest[key] = _TarSample(key, {})
            samples.append(sample)
        sample.pieces[ending] = (offset, member.size)
    # One without anything that is read is a note beside the others, if no picture was forgotten.
    return [
        sample
        for sample in samples
        if any(ending in reading.endings or _is_picture(ending) for ending in sample.pieces)
    ]


def split_name(name: str, key_ends: str) -> tuple[str, str] | None:
    """Key and ending, in lower case, of a member; None for one that is in no sample.

    As in the webdataset library a key has the folders of the name, and hidden files and `__meta__` are passed over; a
    leading `./` says nothing.
    """
    *folders, base = [part for part in name.split("/") if part not in ("", ".")] or [""]
    stem, dot, ending = base.partition(".") if key_ends == "first_dot" else base.rpartition(".")
    first = folders[0] if folders else base
    meta = len(first) > 3 and first.startswith("__") and first.endswith("__")
    if not dot or not stem or stem.startswith(".") or meta or "__MACOSX" in folders:
        return None
    return "/".join((*folders, stem)), ending.lower()


def _is_picture(ending: str) -> bool:
    return f".{ending.rpartition('.')[2]}" in EXTENSIONS


def _rows_of(
    sample: _TarSample, name: str, descriptor: int, reading: Reading, told: Counter[str], class_names: dict[str, str]
) -> list[TarRow]:
    key = sample.key.encode("utf-8", "surrogateescape")
    try:
        image = next((ending for ending in reading.image if ending in sample.pieces), None)
        if image is None:
            raise DecodeError(f"no {' or '.join(reading.image)}, only {listed(list(map(shown, sample.pieces)))}")
        told["image"] += 1
        digest = hashlib.blake2b(read_piece(descriptor, *sample.pieces[image]), digest_size=16).digest()
        texts = _Texts(sample, descriptor)
        values = {what: texts.value(wanted) for what, wanted in reading.texts.items()}
        told.update(what for what, value in values.items() if value not in (None, "", []))
        captions, class_id = _captions(values.get("caption")), _class_of(values.get("label"), reading)
        _remember(class_names, class_id, values.get("class_names"), name)
    except DecodeError as error:
        offset = next(iter(sample.pieces.values()))[0]
        place = hashlib.blake2b(f"{offset} {shown(name)} ".encode() + key, digest_size=16).digest()
        return [TarRow(key, 0, 0, place, "", None, f"{shown(sample.key)}: {error}")]
    wanted = captions if reading.several else captions[:1]
    return [TarRow(key, *sample.pieces[image], digest, caption, class_id, None) for caption in wanted]


class _Texts:
    """What members of a sample say, each read once. Methods raise DecodeError for what is no text."""

    def __init__(self, sample: _TarSample, descriptor: int) -> None:
        self._pieces, self._descriptor = sample.pieces, descriptor
        self._objects: dict[str, dict[str, Any]] = {}

    def value(self, wanted: MemberText | JsonField) -> object:
        """None where there is none."""
        ending = next((ending for ending in wanted.endings if ending in self._pieces), None)
        if ending is None:
            return None
        return self._object(ending).get(wanted.field) if isinstance(wanted, JsonField) else self._text(ending).strip()

    def _text(self, ending: str) -> str:
        offset, size = self._pieces[ending]
        if size > LARGEST_TEXT:
            raise DecodeError(f"{ending} of {size} bytes, more than {LARGEST_TEXT}")
        try:
            return read_piece(self._descriptor, offset, size).decode("utf-8-sig")
        except UnicodeDecodeError:
            raise DecodeError(f"{ending} is not UTF-8") from None

    def _object(self, ending: str) -> dict[str, Any]:
        if ending not in self._objects:
            text = self._text(ending)
            try:
                values = json.loads(text)
            except (ValueError, RecursionError):
                raise DecodeError(f"{ending} is no JSON") from None
            if not isinstance(values, dict):
                raise DecodeError(f"{ending} is no JSON object")
            self._objects[ending] = values
        return self._objects[ending]


def _captions(value: object) -> list[str]:
    """At least one. Raises DecodeError."""
    captions: list[str] = []
    for caption in value if isinstance(value, list) else [value]:
        if caption is None:
            continue
        if (problem := text_problem(caption)) is not None:
            raise DecodeError(f"caption {problem}")
        assert isinstance(caption, str)
        captions.append(caption)
    return list(dict.fromkeys(filter(None, captions))) or [""]


def _class_of(value: object, reading: Reading) -> str | None:
    """What a label calls its class; None for no label. Raises DecodeError for one that cannot be right."""
    if value is None or value == "":
        return None
    if isinstance(value, float) and value.is_integer():  # a column that had nulls in pandas
        value = int(value)
    text = str(value) if type(value) is int else value
    if (problem := text_problem(text)) is not None:
        raise DecodeError(f"label {problem}: {shown(str(value)[:80])}")
    assert isinstance(text, str)
    if NUMBER.fullmatch(text):
        if reading.classes is not None and int(text) >= reading.classes:
            raise DecodeError(f"label {text}; class_names has names for 0 to {reading.classes - 1}")
        return str(int(text))
    plain = isinstance(reading.texts["label"], MemberText)
    if plain or reading.classes is not None or NEARLY.fullmatch(text):
        raise DecodeError(f"label {shown(text[:80])!r}; expected a number from 0")
    return text


def _remember(class_names: dict[str, str], class_id: str | None, name: object, where: str) -> None:
    if class_id is None or name is None or name == "":
        return
    if (problem := text_problem(name)) is not None:
        raise DecodeError(f"name of its class {problem}")
    assert isinstance(name, str)
    add_class_name(class_names, class_id, name, where)


def add_class_name(class_names: dict[str, str], class_id: str, name: str, where: str) -> None:
    """Raises IngestError for a class that has another name already."""
    if class_names.setdefault(class_id, name) != name:
        raise IngestError(
            f"{where}: class {shown(class_id)} is called {shown(name)!r}, and {shown(class_names[class_id])!r} elsewhere; "
            "set prepare_data.source.class_names to null or to a file"
        )
