"""Whether pictures show the words that their prompts put in quotes, as an OCR engine reads them.

A word is what stands between two quotation marks, in lower case and without all that is no letter of ASCII and no digit;
what nothing is left of is no word. The engine reads a picture from top to bottom; of the pieces that it read, those that
follow each other and are nearest to a word are its reading, and without any it is empty, which counts. Figures of two
versions of an engine do not compare, for their weights differ, so the version is a part of their names.
"""

import re
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from vtp.artefact import ArtefactError, digest
from vtp.config import Config, ConfigError
from vtp.distributed import gather_objects, gather_rows
from vtp.evaluation.checks import require_prompted

# In marks of either kind, straight or typographic, but not after an apostrophe, as of it's, and not inches.
QUOTED = re.compile(r"""(?<!\w)(?:"(.+?)"|'(.+?)'|\u201c(.+?)\u201d|\u2018(.+?)\u2019)(?!\w)""")
IGNORED = re.compile(r"[^a-z0-9]")
SMALLEST = 128  # pixels of the shorter side of a picture that is read
REMEDY = "pip install -c constraints.txt -e '.[ocr]', or set `ocr` to null"
WEIGHTS = {  # that rapidocr 3.10 ships, with their SHA-256
    "Det": ("PP-OCRv6_det_small.onnx", "090f04abcd9d9a7498bc4ebf677e4cb9bdce1fe4197ddb7e529f1ef44e1ff94f"),
    "Rec": ("PP-OCRv6_rec_small.onnx", "6f327246b50388f3c176ae304bd95767ea6dc0c9ae92153ef8cbe210b3c14884"),
}


class RapidOcrConfig(Config):
    """rapidocr with the weights that its package ships (PaddleOCR's PP-OCRv6 small), on the CPU."""

    name: Literal["rapidocr"] = Field(description="engine that reads; the extra `ocr` installs it")


class TextReader(Protocol):
    """An OCR engine."""

    name: str  # of the engine and its version, in those of metrics

    def read(self, picture: np.ndarray) -> list[str]:
        """The lines of a picture [H, W, 3] uint8 RGB, from top to bottom."""
        ...


class TextMeasure:
    """The figures of pictures by one engine (`vtp.evaluation.prompt_measures.PromptMeasure`)."""

    def __init__(self, reader: TextReader) -> None:
        self._reader = reader
        self._pictures = 0
        self._accuracies: list[tuple[float, float]] = []  # of words and of characters, by word

    def add(self, images: Tensor, prompts: Sequence[str]) -> None:
        """Images [B, 3, H, W] uint8 and what each was asked to show; those without a word are not read."""
        require_prompted(images, prompts)
        for pixels, prompt in zip(images.permute(0, 2, 3, 1).cpu().numpy(), prompts, strict=True):
            if words := quoted_words(prompt):
                lines = self._reader.read(pixels)
                readings = [nearest_reading(word, lines) for word in words]
                pairs = zip(words, readings, strict=True)
                self._accuracies += [
                    (float(reading == word), character_accuracy(reading, word)) for word, reading in pairs
                ]
                self._pictures += 1

    def figures(self) -> dict[str, float]:
        """Means over the words of all ranks, each of which must ask; the number of pictures alone where there are none."""
        table = gather_rows(torch.tensor(self._accuracies, dtype=torch.float64).view(-1, 2))
        counts = {"prompts_with_words": float(sum(gather_objects(self._pictures)))}
        self._pictures, self._accuracies = 0, []
        if not len(table):
            return counts
        names = (f"word_accuracy_{self._reader.name}", f"character_accuracy_{self._reader.name}")
        return dict(zip(names, table.mean(0).tolist(), strict=True)) | counts


class RapidOcr:
    """rapidocr, which finds lines and reads them.

    Raises ConfigError when it is not installed, ArtefactError when its weights are others than those known here.
    """

    def __init__(self) -> None:
        try:
            import onnxruntime  # noqa: F401 # pyright: ignore[reportMissingImports] - rapidocr asks for it at the first picture
            import rapidocr  # pyright: ignore[reportMissingImports] - the extra `ocr`
        except ImportError as error:
            raise ConfigError(f"ocr: rapidocr reads words, and {error.name} is not installed: {REMEDY}") from None
        self.name = engine_name()
        folder, threads = Path(rapidocr.__path__[0]) / "models", torch.get_num_threads()
        for file, sha256 in WEIGHTS.values():
            if not (folder / file).is_file() or digest(folder / file) != sha256:
                raise ArtefactError(
                    f"{folder / file}: not the weights that rapidocr 3.10 ships; install it again: {REMEDY}"
                )
        self._engine = rapidocr.RapidOCR(
            params={f"{part}.model_path": str(folder / file) for part, (file, _) in WEIGHTS.items()}
            | {
                "Global.use_cls": False,  # lines stand upright
                "Global.log_level": "critical",  # that a picture has no text is no warning
                "Det.limit_side_len": SMALLEST,  # not 736, to which it would enlarge all pictures
                "EngineConfig.onnxruntime.intra_op_num_threads": threads,
                "EngineConfig.onnxruntime.inter_op_num_threads": 1,
            }
        )

    def read(self, picture: np.ndarray) -> list[str]:
        """The lines of a picture [H, W, 3] uint8 RGB, from top to bottom; a small one is enlarged before."""
        from PIL.Image import Resampling, fromarray

        image = fromarray(picture)
        factor = -(-SMALLEST // min(image.size))
        if factor > 1:
            image = image.resize((factor * image.width, factor * image.height), Resampling.LANCZOS)
        return list(getattr(self._engine(image), "txts", None) or ())


def engine_name() -> str:
    """The installed engine in names of metrics, such as rapidocr3p10."""
    major, minor, *_ = version("rapidocr").split(".")
    return f"rapidocr{major}p{minor}"


def engine_facts() -> dict[str, str]:
    """What read the pictures, for provenance: the version of the engine and the digests of its weights by file."""
    weights = ", ".join(f"{file} {sha256}" for file, sha256 in WEIGHTS.values())
    return {engine_name(): f"rapidocr {version('rapidocr')}, onnxruntime {version('onnxruntime')}, {weights}"}


def quoted_words(prompt: str) -> list[str]:
    """The words that a prompt puts in quotes, in its order, as they are compared."""
    quoted = ("".join(filter(None, match.groups())) for match in QUOTED.finditer(prompt))
    return [word for word in map(comparable, quoted) if word]


def comparable(text: str) -> str:
    """The letters and digits of a text, in lower case: all of a text that is compared."""
    return IGNORED.sub("", text.lower())


def nearest_reading(word: str, lines: Sequence[str]) -> str:
    """Of what was read, the pieces that follow each other and together are nearest to a word; empty without any.

    Pieces stand between blanks. From each on, they are joined until they are as long as the word.
    """
    pieces = [piece for line in lines for piece in map(comparable, line.split()) if piece]
    candidates = [""]
    for start in range(len(pieces)):
        reading = ""
        for piece in pieces[start:]:
            reading += piece
            candidates.append(reading)
            if len(reading) >= len(word):
                break
    return max(candidates, key=lambda reading: character_accuracy(reading, word))


def character_accuracy(reading: str, word: str) -> float:
    """1 less the edit distance over the length of the longer one (NED in papers); two empty ones are equal."""
    return 1 - edit_distance(reading, word) / max(len(reading), len(word), 1)


def edit_distance(first: str, second: str) -> int:
    """Fewest characters to insert, delete and exchange that make one text the other (Levenshtein 1966)."""
    row = list(range(len(second) + 1))
    for place, letter in enumerate(first, 1):
        diagonal, row[0] = row[0], place
        for column, other in enumerate(second, 1):
            diagonal, row[column] = row[column], min(diagonal + (letter != other), row[column] + 1, row[column - 1] + 1)
    return row[-1]
