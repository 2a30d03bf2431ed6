"""Pictures of noise with captions in the place of a data set: the work of a step does not depend on what they show."""

import io

import numpy as np
from PIL import Image

COUNT = 4096


class Pictures:
    """What `PretrainBatches` asks of a ShardDataset; every picture is decoded from JPEG anew."""

    def __init__(self, side: int) -> None:
        rng = np.random.default_rng(0)
        self._files = []
        for _ in range(16):
            coarse = Image.fromarray(rng.integers(0, 256, (side // 8 + 1, side // 8 + 1, 3), dtype=np.uint8))
            buffer = io.BytesIO()
            coarse.resize((side, side), Image.Resampling.BICUBIC).save(buffer, format="JPEG", quality=90)
            self._files.append(buffer.getvalue())
        self.captions = [f"picture number {index}" for index in range(COUNT)]

    def __len__(self) -> int:
        return COUNT

    def image(self, index: int) -> Image.Image:
        """A picture, RGB."""
        return Image.open(io.BytesIO(self._files[index % len(self._files)])).convert("RGB")
