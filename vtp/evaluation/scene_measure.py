"""Whether pictures show what their prompts ask for: objects, their number and places, and the background.

Prompts are captions of composed scenes, and say exactly what is to be seen (`vtp.curation.ingest.scenes`). What is there a
detector tells that was trained on such scenes, as GenEval does for photographs (Ghosh et al. 2023). A detector makes
mistakes on real pictures too, so figures compare with those of real pictures with their captions.
"""

from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from vtp.curation.ingest.scenes import BACKGROUNDS, RELATIONS, CaptionGrammar, Scene, relations, relations_of_place
from vtp.distributed import total
from vtp.models.scene_detector import Detection, SceneDetector

ASPECTS = ("object", "count", "position", "background", "scene")
BORDER = 16  # the outermost part of the short edge, at least one pixel, in which the background is looked for


class SceneMeasure:
    """Counts right answers over pictures with prompts; ranks may hold different ones."""

    def __init__(self, detector: SceneDetector) -> None:
        self._detector = detector
        self._captions = CaptionGrammar(detector.classes)
        self._right, self._asked = Counter[str](), Counter[str]()
        self._foreign = 0

    def add(self, images: Tensor, prompts: Sequence[str]) -> None:
        """Judge uint8 images [B, 3, H, W] by their prompts. Raises ValueError when there are not as many prompts."""
        if len(images) != len(prompts):
            raise ValueError(f"{len(images)} images and {len(prompts)} prompts; every image has its own")
        scenes = [self._captions.parse(prompt) for prompt in prompts]
        found = self._detector.detect(images)
        shape = (images.shape[3], images.shape[2])
        for scene, detections, background in zip(scenes, found, backgrounds(images), strict=True):
            if scene is None:
                self._foreign += 1
                continue
            for aspect, right in judge(scene, detections, background, shape).items():
                self._asked[aspect] += 1
                self._right[aspect] += right

    def figures(self) -> dict[str, float]:
        """Shares of prompts whose picture is right, by what is asked, with the number of these prompts.

        Of the pictures since the last call. `foreign_prompts` are no captions of such scenes, and count nowhere else.
        Shares of no prompts are left out. Every rank must ask, and gets the figures of all.
        """
        own = [count[aspect] for count in (self._right, self._asked) for aspect in ASPECTS]
        counts = total(torch.tensor([*own, self._foreign])).tolist()
        self._right, self._asked, self._foreign = Counter(), Counter(), 0
        right, asked, foreign = counts[: len(ASPECTS)], counts[len(ASPECTS) : -1], counts[-1]
        figures: dict[str, float] = {}
        for aspect, correct, prompts in zip(ASPECTS, right, asked, strict=True):
            if prompts:
                figures[f"{aspect}_accuracy"] = correct / prompts
            figures[f"{aspect}_prompts"] = prompts
        return figures | {"foreign_prompts": foreign}


def judge(scene: Scene, detections: Sequence[Detection], background: str, shape: tuple[int, int]) -> Mapping[str, bool]:
    """What a prompt asks for, and whether it is there, in a picture of this `shape` (width, height).

    - object: every thing is there.
    - count: there are exactly so many of each thing that is counted.
    - position: the surest of the first thing has the relation to the surest of the second by GenEval's rule, and things lie
      where they are asked for: likewise from the middle of the picture.
    - background: its name is that of the nearest colour.
    - scene: all of it, and no other thing. Prompts with a word, which is not read here, ask for no scene.
    """
    by_label: dict[int, list[Detection]] = {}
    for each in sorted(detections, key=lambda detection: -detection.score):
        by_label.setdefault(each.label, []).append(each)
    things = scene.things
    answers: dict[str, bool] = {}
    if things:
        answers["object"] = all(thing.label in by_label for thing in things)
    if counted := [thing for thing in things if thing.number is not None]:
        answers["count"] = all(len(by_label.get(thing.label, ())) == thing.number for thing in counted)
    if scene.kind in ("places", "relations"):
        answers["position"] = answers["object"] and _placed(scene, by_label, shape)
    if scene.background is not None:
        answers["background"] = background == scene.background
    if scene.word is None:
        wanted = sum(thing.number or 1 for thing in things)
        answers["scene"] = all(answers.values()) and len(detections) == wanted
    return answers


def _placed(scene: Scene, by_label: Mapping[int, list[Detection]], shape: tuple[int, int]) -> bool:
    """Whether things that are all there lie where a scene has them."""
    surest = [by_label[thing.label][0] for thing in scene.things]
    centres = np.array([each.centre for each in surest])
    if scene.relation is not None:
        offset = (centres[0] - centres[1]) * shape
        sizes = (surest[0].size + surest[1].size) * min(shape)
        return bool(relations(offset, sizes)[list(RELATIONS).index(scene.relation)])
    asked = np.stack([relations_of_place(str(thing.place)) for thing in scene.things])
    return bool((relations(centres - 0.5) >= asked).all())


def backgrounds(images: Tensor) -> list[str]:
    """Names of the backgrounds of uint8 images [B, 3, H, W]: what most pixels near the border are nearest to."""
    edge = max(1, min(images.shape[2:]) // BORDER)
    inside = torch.zeros(images.shape[2:], dtype=torch.bool)
    inside[edge:-edge, edge:-edge] = True
    pixels = images[:, :, ~inside.to(images.device)].permute(0, 2, 1).float()  # [B, N, 3]
    colours = torch.tensor(list(BACKGROUNDS.values()), dtype=torch.float, device=images.device)
    nearest = torch.cdist(pixels, colours.expand(len(pixels), -1, -1)).argmin(2)  # [B, N]
    votes = torch.nn.functional.one_hot(nearest, len(colours)).sum(1)
    names = list(BACKGROUNDS)
    return [names[number] for number in votes.argmax(1).tolist()]
