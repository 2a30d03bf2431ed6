"""What the tests of detectors share: composed scenes of a few drawings, and a network that knows what is in them."""

import torch
from curation.ingest.test_scenes import config_of
from torch import nn

from vtp.curation.ingest.arrange import Arrangement, Place
from vtp.curation.ingest.scenes import Scene, Thing
from vtp.models.scene_detector import DetectorConfig, Heatmaps, SceneDetector
from vtp.objectives.detection import targets_of

NAMES = ["frog", "church", "orange", "crab"]
SURE = 8.0  # a logit


def scenes_of(**changes):
    """Parameters of scenes of few drawings."""
    values = {"classes": 4, "image_size": 32, "words": None, "scenes": ["places", "counts", "relations"]}
    return config_of(**(values | changes))


def arrangement_of(*places, canvas=(32, 32), background="pink"):
    """Pictures as (label, centre in pixels, size in pixels)."""
    drawn = tuple(Place(label, centre, size, 0.0) for label, centre, size in places)
    return Arrangement(canvas, Scene(tuple(Thing(place.label) for place in drawn), background=background), drawn)


class KnownScenes(SceneDetector):
    """Says of every image what its arrangement is; images must come in the order of the arrangements."""

    def __init__(self, arrangements, *, stride=2, image_size=32, names=NAMES):
        super().__init__(DetectorConfig(width=8, stride=stride), classes=names, image_size=image_size)
        self.arrangements = list(arrangements)

    def forward(self, images):
        maps = [targets_of(self.arrangements.pop(0), self.config.stride) for _ in images]
        near, labels, sizes = (
            torch.stack([torch.from_numpy(each) for each in kind]) for kind in zip(*maps, strict=True)
        )
        classes = SURE * nn.functional.one_hot(labels, len(self.classes)).permute(0, 3, 1, 2).float()
        return Heatmaps(torch.logit(near.clamp(1e-4, 1 - 1e-4)), classes, sizes)
