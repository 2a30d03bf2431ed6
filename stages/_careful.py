"""img2dataset's resizer and downloader with their traps taken out; imported by the processes that fetch, nowhere else.

cv2 decodes what a header announces, however much; it ignores the orientation of a JPEG when alpha and 16 bits are kept,
and those 16 bits are then written as if they were 8. So pictures are decoded by `vtp.data.decode`, and handed to
img2dataset as plain RGB: its own code resizes and encodes them. Both classes travel by pickle, to spawned processes and
to Spark's executors alike, so nothing has to be patched there.
"""

import io
import os
import time
import urllib.request
from typing import Any
from urllib.request import Request

from img2dataset.downloader import Downloader
from img2dataset.resizer import Resizer

from stages._launch import follow_parent
from vtp.data.decode import DecodeError, decode_rgb
from vtp.data.fetching.policy import DEADLINE_HEADER

Resized = tuple[bytes | None, int | None, int | None, int | None, int | None, str | None]


class CarefulResizer(Resizer):
    """`max_image_area` is the limit of the header, before anything is decoded."""

    def __call__(self, img_stream: io.BytesIO, blurring_bbox_list: list | None = None) -> Resized:
        """Encoded picture, its width and height, those of the original when upright, and an error or None."""
        try:
            picture = decode_rgb(img_stream.getvalue(), max_pixels=int(self.max_image_area))
            plain = b"P6 %d %d 255\n" % picture.size + picture.tobytes()
        except DecodeError as error:
            return None, None, None, None, None, str(error)
        except Exception as error:  # img2dataset would lose the row
            return None, None, None, None, None, f"not a readable image ({type(error).__name__}: {error})"
        *resized, problem = super().__call__(io.BytesIO(plain), blurring_bbox_list)
        return *resized, problem and f"cannot be resized ({problem})"


class GuardedDownloader:
    """img2dataset's downloader in a process that reaches the network through the guard alone."""

    def __init__(self, downloader: Downloader, *, guard: str, deadline: float) -> None:
        self._downloader = downloader
        self._guard = guard
        self._deadline = deadline

    def __call__(self, shard: tuple[int, str]) -> tuple[bool, Any]:
        """Fetch a shard."""
        follow_parent()
        os.environ["NO_ALBUMENTATIONS_UPDATE"] = "1"
        opener = urllib.request.OpenerDirector()
        for handler in (
            _ThroughGuard(self._guard, self._deadline),
            urllib.request.HTTPHandler(),
            urllib.request.HTTPErrorProcessor(),
            urllib.request.HTTPRedirectHandler(),
            urllib.request.HTTPDefaultErrorHandler(),
            urllib.request.UnknownHandler(),  # of file:, ftp:, data:, which have no handler here
        ):
            opener.add_handler(handler)
        urllib.request.install_opener(opener)
        return self._downloader(shard)


class _ThroughGuard(urllib.request.BaseHandler):
    """Sends every request to the guard, `https` ones too: it speaks TLS, and sees what it would not see in a tunnel."""

    handler_order = 100  # before the handlers that connect

    def __init__(self, guard: str, deadline: float) -> None:
        self._guard = guard
        self._deadline = deadline

    def http_request(self, request: Request) -> Request:
        if not request.has_header(DEADLINE_HEADER.capitalize()):  # a redirect carries the first one on
            request.add_header(DEADLINE_HEADER, f"{time.time() + self._deadline:.3f}")
        request.type, request.host, request.selector = "http", self._guard, request.full_url
        return request

    https_request = http_request
