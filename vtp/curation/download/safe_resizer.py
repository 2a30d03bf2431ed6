"""img2dataset's resizer and downloader with their traps taken out; imported by the processes that fetch, nowhere else.

cv2 decodes what a header announces, however much; it ignores the orientation of a JPEG when alpha and 16 bits are kept,
and those 16 bits are then written as if they were 8. So pictures are decoded by `vtp.layers.decode`, and handed to
img2dataset as plain RGB: its own code resizes and encodes them. Both classes travel by pickle, to spawned processes and
to Spark's executors alike, so nothing has to be patched there.
"""

import io
import time
import urllib.request
from typing import Any
from urllib.error import URLError
from urllib.request import Request

from img2dataset.downloader import Downloader
from img2dataset.resizer import ResizeMode, Resizer

from vtp.curation.download.policy import DEADLINE_HEADER
from vtp.layers.decode import DecodeError, decode_rgb
from vtp.processes import follow_parent

MAX_URL = 16 << 10  # well below the proxy's limit of a head, at which it ends the connection without a word
Resized = tuple[bytes | None, int | None, int | None, int | None, int | None, str | None]


class SafeResizer(Resizer):
    """`max_image_area` is the limit of the header, before anything is decoded, and of what a picture is enlarged to."""

    def __call__(self, img_stream: io.BytesIO, blurring_bbox_list: list | None = None) -> Resized:
        """Encoded picture, its width and height, those of the original when upright, and an error or None."""
        try:
            picture = decode_rgb(img_stream.getvalue(), max_pixels=int(self.max_image_area))
            plain = b"P6 %d %d 255\n" % picture.size + picture.tobytes()
        except DecodeError as error:
            return None, None, None, None, None, str(error)
        except Exception as error:  # img2dataset would lose the row
            return None, None, None, None, None, f"not a readable image ({type(error).__name__}: {error})"
        if self._enlarged(*picture.size) > self.max_image_area:
            return None, None, None, None, None, "cannot be resized (its longer side would be too long)"
        *resized, problem = super().__call__(io.BytesIO(plain), blurring_bbox_list)
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


class ProxiedDownloader:
    """img2dataset's downloader in a process that reaches the network through the proxy alone."""

    def __init__(self, downloader: Downloader, *, proxy: str, deadline: float) -> None:
        self._downloader = downloader
        self._proxy = proxy
        self._deadline = deadline

    def __call__(self, shard: tuple[int, str]) -> tuple[bool, Any]:
        """Fetch a shard."""
        follow_parent()
        opener = urllib.request.OpenerDirector()
        for handler in (
            _ThroughProxy(self._proxy, self._deadline),
            urllib.request.HTTPHandler(),
            urllib.request.HTTPErrorProcessor(),
            urllib.request.HTTPRedirectHandler(),
            urllib.request.HTTPDefaultErrorHandler(),
            urllib.request.UnknownHandler(),  # of file:, ftp:, data:, which have no handler here
        ):
            opener.add_handler(handler)
        urllib.request.install_opener(opener)
        return self._downloader(shard)


class _ThroughProxy(urllib.request.BaseHandler):
    """Sends every request to the proxy, `https` ones too: it speaks TLS, and sees what it would not see in a tunnel."""

    handler_order = 100  # before the handlers that connect

    def __init__(self, proxy: str, deadline: float) -> None:
        self._proxy = proxy
        self._deadline = deadline

    def http_request(self, request: Request) -> Request:
        if len(request.full_url) > MAX_URL:  # of a row, or of a redirect
            raise URLError("URL too long")
        if not request.has_header(DEADLINE_HEADER.capitalize()):  # a redirect carries the first one on
            request.add_header(DEADLINE_HEADER, f"{time.time() + self._deadline:.3f}")
        request.type, request.host, request.selector = "http", self._proxy, request.full_url
        return request

    https_request = http_request
