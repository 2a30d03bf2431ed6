"""Rules by which rows are kept, as they stand in params.yaml. They apply in the order of their list.

Most look at one row at a time. The others look at all rows that are left: duplicates, the best share of a score, a
subset. What a rule finds no value for, it keeps or drops as its `missing` says. `column` and `by` name a column of the
source, or a role (`url`, `caption`, `sha256`, ...; see `vtp.curation.rows`).
"""

from typing import Annotated, Literal, NamedTuple, Self

from pydantic import AfterValidator, Field, model_validator

from vtp.config import Config
from vtp.curation.places import inside, path_problem
from vtp.curation.rows import CAPTION, HEIGHT, WIDTH
from vtp.texts import shown

KeepOrDrop = Literal["keep", "drop"]
STATUS = "status"
IMAGE_COLUMNS = ("tar", "offset", "size")  # where the image of a pool's row lies


def _inside(name: str) -> str:
    if path_problem(name) is not None or not inside(name) or name == ".":
        raise ValueError("expected the name of a file inside of the folder, without ..")
    return name


def _compiles(regex: str) -> str:
    import pyarrow as pa
    import pyarrow.compute as pc

    try:
        pc.match_substring_regex(pa.array([""]), regex)  # pyright: ignore[reportAttributeAccessIssue]
    except pa.ArrowInvalid as error:
        raise ValueError(f"not a regular expression of RE2: {error}") from None
    return regex


FileName = Annotated[str, AfterValidator(_inside)]
Regex = Annotated[str, AfterValidator(_compiles)]


class _Bounded(Config):
    """At least one bound, and none that excludes all."""

    @model_validator(mode="after")
    def _bounds_are_ordered(self) -> Self:
        bounds = {name: value for name, value in self if name.startswith(("min", "max")) and value is not None}
        if not bounds:
            raise ValueError("all bounds are null: this rule would remove nothing; give one, or take the rule out")
        for name, least in bounds.items():
            most = bounds.get(name.replace("min", "max", 1))
            if name.startswith("min") and most is not None and least > most:
                raise ValueError(f"{name} {least} is above {name.replace('min', 'max', 1)} {most}: nothing would pass")
        return self


class Downloaded(Config):
    """Rows of a pool whose image was fetched."""

    name: Literal["downloaded"]


class PixelSize(_Bounded):
    """Sides and area of the image in pixels: as the metadata claims before the download, measured in a pool."""

    name: Literal["size"]
    min_side: int | None = Field(ge=0, description="least length of the shorter side; null: no limit")
    max_side: int | None = Field(ge=0, description="largest length of the longer side; null: no limit")
    min_area: int | None = Field(ge=0, description="least area in pixels; null: no limit")
    max_area: int | None = Field(ge=0, description="largest area in pixels; null: no limit")
    missing: KeepOrDrop = Field(description="what becomes of rows without a width or height")


class AspectRatio(Config):
    """Longer side by shorter side."""

    name: Literal["aspect_ratio"]
    max: float = Field(ge=1, description="largest ratio of the longer to the shorter side")
    missing: KeepOrDrop = Field(description="what becomes of rows without a width or height")


class CaptionLength(_Bounded):
    """Words (between white space) and characters of the caption."""

    name: Literal["caption_length"]
    min_words: int | None = Field(ge=0, description="fewest words of a caption; null: no limit")
    max_words: int | None = Field(ge=0, description="most words of a caption; null: no limit")
    min_characters: int | None = Field(ge=0, description="fewest characters of a caption; null: no limit")
    max_characters: int | None = Field(ge=0, description="most characters of a caption; null: no limit")
    missing: KeepOrDrop = Field(description="what becomes of rows without a caption")


class Language(Config):
    """The language of the caption as py3langid detects it; a source's own column is a `category`."""

    name: Literal["language"]
    allowed: list[str] = Field(min_length=1, description="ISO 639-1 codes")
    min_probability: float = Field(ge=0, le=1, description="least probability of the language that is detected")
    missing: KeepOrDrop = Field(description="what becomes of rows without a caption")


class Number(_Bounded):
    """A column of numbers, such as a similarity, an NSFW or a watermark score; NaN counts as missing."""

    name: Literal["number"]
    column: str = Field(description="column of the numbers")
    min: float | None = Field(description="least number that stays; null: no limit")
    max: float | None = Field(description="largest number that stays; null: no limit")
    missing: KeepOrDrop = Field(description="what becomes of rows without a number")


class Category(Config):
    """A column with names, such as a language or an NSFW verdict."""

    name: Literal["category"]
    column: str = Field(description="column whose values decide")
    allowed: list[str] = Field(min_length=1, description="values that stay")
    missing: KeepOrDrop = Field(description="what becomes of rows without a value")


class Pattern(Config):
    """A text that holds what the regular expression describes (RE2 syntax; `(?i)` ignores case)."""

    name: Literal["pattern"]
    column: str = Field(description="column of the texts")
    regex: Regex = Field(description="regular expression in RE2's syntax, found anywhere in the text")
    matches: KeepOrDrop = Field(description="keep: rows that match stay, the others go; drop: rows that match go")
    missing: KeepOrDrop = Field(description="what becomes of rows without a text")


class HashList(Config):
    """A list of hashes of 128 bits and more: text with one hexadecimal number a line, or DataComp's .npy of uids."""

    name: Literal["hash_list"]
    column: str = Field(description="column whose values are looked up")
    file: FileName = Field(description="name of the list in the folder --lists")
    action: Literal["allow", "block"] = Field(description="whether rows in the list stay or go")
    missing: KeepOrDrop = Field(description="what becomes of rows without a value")


class Duplicates(Config):
    """Rows with the same value; the one that comes first in the output's order stays. Nulls are equal to nothing."""

    name: Literal["duplicates"]
    by: str = Field(description="column or role whose equal values make duplicates; the first row stays")
    missing: KeepOrDrop = Field(description="what becomes of rows without a value")


class PerceptualDuplicates(Config):
    """Pool rows whose image looks like that of an earlier row: 64-bit perceptual hashes that differ in few bits.

    A row is removed when any row before it is as near, removed or not, so the result depends on no order of work.
    """

    name: Literal["perceptual_duplicates"]
    max_distance: int = Field(
        ge=0,
        le=12,
        description="bits in which the hashes of duplicates may differ; 0: equal hashes. Near copies differ in 0 to 6",
    )


class TopFraction(Config):
    """The best share of the rows that have a score, rounded down; among equals, those first in the output's order."""

    name: Literal["top_fraction"]
    column: str = Field(description="column of the scores")
    fraction: float = Field(gt=0, le=1, description="share of the rows that stay")
    best: Literal["highest", "lowest"] = Field(description="whether the highest or the lowest scores are best")
    missing: KeepOrDrop = Field(description="what becomes of rows without a score")


class OpenClipModel(Config):
    """A model of open_clip with weights from a file."""

    name: Literal["open_clip"]
    architecture: str = Field(pattern=r"^[\w.-]+$", description="name of open_clip's model, such as ViT-L-14-quickgelu")
    weights: FileName = Field(description="file under weights/, .safetensors or .pt")
    sha256: str = Field(description="digest that the file must have")


class TokenizerModel(Config):
    """The tokenizer in the folder --tokenizer; it needs a text tower."""

    name: Literal["tokenizer"]


class Minimum(Config):
    """Scores that are at least so high."""

    name: Literal["min"]
    value: float = Field(ge=-1, le=1, description="least cosine between image and caption")


class BestShare(Config):
    """As in `top_fraction`."""

    name: Literal["top_fraction"]
    fraction: float = Field(gt=0, le=1, description="share of the rows that stay")


class ClipScore(Config):
    """Cosine between a pool's image and its caption."""

    name: Literal["clip_score"]
    model: OpenClipModel | TokenizerModel = Field(discriminator="name")
    keep: Minimum | BestShare = Field(discriminator="name")
    batch_size: int = Field(ge=1, description="images per forward pass; changes scores by rounding")
    missing: KeepOrDrop = Field(description="rows without a caption")


class Subset(Config):
    """The rows that come first in the output's order, which is random: a smaller subset lies within a larger one."""

    name: Literal["subset"]
    size: int = Field(ge=1, description="number of rows that stay: those with the smallest hash of their key")


RowRule = (
    Downloaded | PixelSize | AspectRatio | CaptionLength | Language | Number | Category | Pattern | HashList
)  # decided for each row by itself
ImageRule = PerceptualDuplicates | ClipScore
SetRule = Duplicates | ImageRule | TopFraction | Subset  # decided for all rows together
Rule = Annotated[RowRule | SetRule, Field(discriminator="name")]
ColumnKind = Literal["text", "number", "single", "any"]  # single: no list, no struct


class Need(NamedTuple):
    """A column that a rule reads."""

    column: str
    kind: ColumnKind


def needs(rule: RowRule | SetRule) -> list[Need]:  # noqa: PLR0911 - one a rule
    """The columns that a rule reads, by role or by the source's own name."""
    match rule:
        case Downloaded():
            return [Need(STATUS, "text")]
        case PixelSize() | AspectRatio():
            return [Need(WIDTH, "number"), Need(HEIGHT, "number")]
        case CaptionLength() | Language():
            return [Need(CAPTION, "text")]
        case Number() | TopFraction():
            return [Need(rule.column, "number")]
        case Category():
            return [Need(rule.column, "single")]
        case Pattern() | HashList():
            return [Need(rule.column, "text")]
        case Duplicates():
            return [Need(rule.by, "any")]
        case PerceptualDuplicates() | ClipScore():
            tar, offset, size = IMAGE_COLUMNS
            caption = [Need(CAPTION, "text")] if isinstance(rule, ClipScore) else []
            return [Need(tar, "text"), Need(offset, "number"), Need(size, "number"), *caption]
        case Subset():
            return []


def label(rule: RowRule | SetRule) -> str:
    """What the funnel calls a rule."""
    detail = getattr(rule, "column", None) or getattr(rule, "by", None)
    return f"{rule.name}_{shown(detail)}" if detail else rule.name
