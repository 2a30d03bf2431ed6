"""Measures of prompts by a CLIP and an engine that are given, on ranks that `torchrun tests/prompted.py FOLDER` starts."""

import sys
from pathlib import Path

import torch
import torch.nn.functional as F

from vtp.data.prompt_files import Prompt
from vtp.distributed import own_rows, process_group, ranks
from vtp.evaluation.clip_score import ClipScorer
from vtp.evaluation.export import DpgExport, GenevalExport, build_writer
from vtp.evaluation.prompt_clip import ClipMeasure, RetrievalConfig
from vtp.evaluation.prompt_text import TextMeasure

BATCH, SAMPLES, SIDE = 5, 24, 6
WORDS = ["cat", "horse", "bee", "owl", "newt", "gnu"]
PROMPTS = [f'the word "{word}"' for word in WORDS] + ["no word"] * 2


def given_scorer(images, captions):
    """A CLIP whose embeddings are `images` [N, E] by a picture's first value, and `captions` [P, E] by the prompt's."""
    model = torch.nn.Module()
    model.encode_image = lambda pixels: images[pixels[:, 0, 0, 0].long()]
    model.encode_text = lambda tokens: captions[tokens[:, 0]]

    def prepare(image):
        return torch.tensor(image.getpixel((0, 0)), dtype=torch.uint8).view(3, 1, 1)

    return ClipScorer(
        model, lambda pixels: pixels, prepare, lambda texts: torch.tensor([[int(t)] for t in texts]), device="cpu"
    )


def numbered(numbers, side=1):
    """Pictures [B, 3, side, side] whose values are their numbers."""
    return torch.tensor(list(numbers), dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 3, side, side)


class Misreader:
    """Reads the word of two pictures of three, and of the third its letters but the first, below another line."""

    name = "misreader1p0"

    def read(self, picture):
        number = int(picture[0, 0, 0])
        word = WORDS[number % len(PROMPTS)]
        return [word.upper()] if number % 3 else ["Else!", word[1:]]


def samples_of(names):
    return [Prompt(text="x", name=name, metadata={"tag": "two", "prompt": "x"}) for name in names]


def work(folder):
    """Figures of pictures that ranks share in whole batches, and the files of `folder`."""
    draws = torch.Generator().manual_seed(0)
    images, captions = (F.normalize(torch.randn(SAMPLES, 8, generator=draws), dim=1) for _ in range(2))
    scorer = given_scorer(images + captions[torch.arange(SAMPLES) % 20] / 2, captions)
    clip = ClipMeasure("given", scorer, map(str, range(20)), RetrievalConfig(among=12, seed=3))
    text = TextMeasure(Misreader())
    prompts = samples_of([f"{number % 6:05d}" for number in range(SAMPLES)])  # in turn, so that ranks share each
    forms = (GenevalExport(name="geneval"), DpgExport(name="dpg"))
    writers = [
        build_writer(form, folder / form.name, "plain", image_size=SIDE, scratch=folder / "scratch", prompts=prompts)
        for form in forms
    ]
    for number in own_rows(-(-SAMPLES // BATCH)):
        rows = range(SAMPLES)[number * BATCH : (number + 1) * BATCH]
        clip.add(numbered(rows), [str(row % 20) for row in rows])
        text.add(numbered(rows), [PROMPTS[row % len(PROMPTS)] for row in rows])
        for writer in writers:
            writer.add(rows.start, numbered(rows, SIDE))
    for writer in writers:
        writer.finish(torch.zeros(SAMPLES))
    return clip.figures() | text.figures()


if __name__ == "__main__":
    with process_group("cpu", timeout=300):
        assert ranks().size == 2
        place = Path(sys.argv[1])
        torch.save(work(place), place / f"figures-{ranks().rank}.pt")
