"""img2dataset's resizer and writer with their traps taken out; imported by the processes that fetch, nowhere else.

cv2 decodes what a header announces, however much; it ignores the orientation of a JPEG when alpha and 16 bits are kept,
and those 16 bits are then written as if they were 8. So pictures are decoded by `vtp.layers.decode`, and handed to
img2dataset as plain RGB: its own code resizes and encodes them. Its downloader prints that a picture cannot be written,
and goes on.
"""

import hashlib
import io
from typing import Any

from img2dataset.resizer import ResizeMode, Resizer
from img2dataset.writer import WebDatasetSampleWriter

from vtp.curation.download.store import SHA256_DIFFERS
from vtp.layers.decode import DecodeError, decode_rgb

Resized = tuple[bytes | None, int | None, int | None, int | None, int | None, str | None]


class SafeResizer(Resizer):
    """`max_image_area` is the limit of the header, before anything is decoded, and of what a picture is enlarged to."""

    def __call__(self, img_stream: io.BytesIO, expected: str | None = None) -> Resized:
        """Encoded picture, its width and height, those of the original when upright, and an error or None.

        `expected`: sha256 that the bytes must have; empty for any. A row's boxes to blur would come in its place, and
        img2dataset's own check takes a shard whose every row has a digest.
        """
        content = img_stream.getvalue()
        if expected and hashlib.sha256(content).hexdigest() != expected:
            return None, None, None, None, None, SHA256_DIFFERS
        try:
            picture = decode_rgb(content, max_pixels=int(self.max_image_area))
            plain = b"P6 %d %d 255\n" % picture.size + picture.tobytes()
        except DecodeError as error:
            return None, None, None, None, None, str(error)
        except Exception as error:  # img2dataset would lose the row
            return None, None, None, None, None, f"not a readable image ({type(error).__name__}: {error})"
        if self._enlarged(*picture.size) > self.max_image_area:
            return None, None, None, None, None, "cannot be resized (its longer side would be too long)"
        *resized, problem = super().__call__(io.BytesIO(plain))
        if problem is None and not resized[0]:  # how some releases of cv2 tell that they cannot encode it
            problem = "nothing was encoded"
        return *resized, problem and f"cannot be resized ({problem})"

    def _enlarged(self, width: int, height: int) -> float:
        """Pixels when the shorter side is enlarged to `image_size`: a line of a few bytes may become gigabytes."""
        short = min(width, height)
        by_shorter = self.resize_mode in (ResizeMode.keep_ratio, ResizeMode.center_crop)
        if not by_shorter or self.resize_only_if_bigger or short >= self.image_size:
            return 0
        return width * height * (self.image_size / short) ** 2


class StrictWriter(WebDatasetSampleWriter):
    """Ends a shard with the error of the picture that it could not write."""

    problem: OSError | None = None

    def write(self, img_str: bytes | None, key: str, caption: str | None, meta: dict[str, Any]) -> None:
        try:
            super().write(img_str, key, caption, meta)
        except OSError as error:
            self.problem = error
            raise

    def close(self) -> None:
        """Raises OSError, for want of room on the disk for example."""
        super().close()
        if self.problem is not None:
            raise self.problem
