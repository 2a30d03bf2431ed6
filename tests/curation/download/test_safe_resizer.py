"""The parts of img2dataset that are replaced, one at a time; together they are tested with the stage download."""

import hashlib
import io
import resource

import pyarrow as pa
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


def test_bytes_of_another_digest_are_not_looked_at(resizers):
    resize = resizers.SafeResizer(96, "no", resize_only_if_bigger=False, max_image_area=100_000)
    content = encoded(halves(), "PNG")
    digest = hashlib.sha256(content).hexdigest()
    assert resize(io.BytesIO(content), digest)[-1] is None
    assert resize(io.BytesIO(content), "")[-1] is None
    assert resize(io.BytesIO(content[:-50]), digest)[-1] == "sha256 differs"


def test_a_picture_that_cannot_be_written_ends_the_shard(resizers, tmp_path):
    """img2dataset alone would print so and go on without it."""
    schema = pa.schema([("key", pa.string())])
    writer = resizers.StrictWriter(0, str(tmp_path), True, 5, schema, "jpg")
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limit[1]))
        with pytest.raises(OSError, match="File too large"):
            writer.write(b"0" * 1_000_000, "00000", "a caption", {"key": "00000"})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    writer.write(b"1", "00001", None, {"key": "00001"})
    with pytest.raises(OSError, match="File too large"):
        writer.close()
