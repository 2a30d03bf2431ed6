"""The parts of img2dataset that are replaced, one at a time; together they are tested with the stage download."""

import io
import urllib.error
import urllib.request

import pytest
from PIL import Image
from servers import encoded, halves


@pytest.fixture(scope="module")
def resizers():
    """Imported late: it imports img2dataset, which takes seconds."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NO_ALBUMENTATIONS_UPDATE", "1")
        from vtp.curation.download import safe_resizer

        yield safe_resizer


@pytest.mark.parametrize("mode", ["keep_ratio", "center_crop"])
def test_a_line_is_not_enlarged_to_gigabytes(resizers, mode):
    line = encoded(Image.new("RGB", (20_000, 1)), "PNG")
    picture = encoded(halves(), "PNG")  # 64 x 48
    options = {"image_size": 96, "resize_mode": mode, "max_image_area": 100_000}
    resize = resizers.SafeResizer(resize_only_if_bigger=False, **options)
    assert resize(io.BytesIO(line))[-1] == "cannot be resized (its longer side would be too long)"
    assert resize(io.BytesIO(picture))[1:] == (96 if mode == "center_crop" else 128, 96, 64, 48, None)
    keep = resizers.SafeResizer(resize_only_if_bigger=True, **options)
    assert keep(io.BytesIO(line))[1:] == (20_000, 1, 20_000, 1, None)


def test_what_cannot_be_encoded_is_no_success(resizers):
    resize = resizers.SafeResizer(96, "no", resize_only_if_bigger=False, max_image_area=100_000)
    line = encoded(Image.new("RGB", (70_000, 1)), "PNG")  # longer than a JPEG can be
    assert resize(io.BytesIO(line))[-1].startswith("cannot be resized")


def test_a_url_that_is_too_long_is_not_sent(resizers):
    through = resizers._ThroughProxy("127.0.0.1:9", 5.0)
    request = through.http_request(urllib.request.Request("https://a/" + "b" * 10_000))
    assert (request.type, request.host, request.full_url[:10]) == ("http", "127.0.0.1:9", "https://a/")
    with pytest.raises(urllib.error.URLError, match="URL too long"):
        through.http_request(urllib.request.Request("https://a/" + "b" * 20_000))
