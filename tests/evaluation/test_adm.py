"""Files of ADM's evaluation: what numpy and ADM write is read, what is not theirs is refused unread."""

import struct
import zipfile
import zlib

import numpy as np
import pytest
import torch

from vtp.artefact import ArtefactError
from vtp.evaluation.adm import AdmReference, write_batch


def images(seed, count=5, side=8):
    return torch.randint(256, (count, 3, side, side), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def arrays(count=5, side=8):
    """As in VIRTUAL_imagenet256_labeled.npz, with few images."""
    draws = np.random.default_rng(0)
    found = {"arr_0": images(0, count, side).permute(0, 2, 3, 1).numpy(), "arr_1": np.zeros(count, np.int64)}
    for dim, end in ((2048, ""), (2023, "_s")):
        few = draws.standard_normal((20, dim))
        found |= {f"mu{end}": few.mean(0), f"sigma{end}": few.T @ few / 20}
    return found


@pytest.fixture(scope="module")
def whole():
    return arrays()


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_a_reference_batch_is_read(tmp_path, whole, save):
    save(tmp_path / "batch.npz", **whole)
    batch = AdmReference(tmp_path / "batch.npz")
    assert (batch.count, batch.image_size) == (5, 8)
    for moments, end in ((batch.statistics, ""), (batch.spatial, "_s")):
        np.testing.assert_array_equal(moments.mean, whole[f"mu{end}"])
        np.testing.assert_allclose(moments.covariance, whole[f"sigma{end}"], rtol=1e-12, atol=1e-14)
    found = list(batch.batches(2, range(3)))
    assert [len(part) for part in found] == [2, 2, 1]
    assert torch.equal(torch.cat(found), images(0))
    assert torch.equal(torch.cat(list(batch.batches(2, [2]))), images(0)[4:])  # a rank's share
    assert torch.equal(torch.cat(list(batch.batches(1, [1, 3]))), images(0)[[1, 3]])
    assert list(batch.batches(2, range(0))) == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mu_s": None}, r"no mu_s\.npy among arr_0\.npy"),
        ({"mu": np.zeros(512)}, r"mu holds float64 \[512\], not floating \[2048\]"),
        ({"mu": np.zeros(2048, np.int64)}, "mu holds int64"),
        ({"mu": np.full(2048, np.nan)}, "mu or sigma holds NaN or infinity"),
        ({"sigma": -np.eye(2048)}, "sigma is no covariance"),
        ({"sigma_s": np.triu(np.ones((2023, 2023)))}, "sigma_s is no covariance"),
        ({"sigma": np.asfortranarray(np.random.rand(2048, 2048))}, "sigma cannot be read .columns first"),
        ({"arr_0": np.zeros((5, 8, 8, 3), np.float32)}, r"arr_0 holds float32 \[5, 8, 8, 3\]"),
        ({"arr_0": np.zeros((5, 3, 8, 8), np.uint8)}, "not uint8"),
        ({"arr_0": np.zeros((5, 8, 4, 3), np.uint8)}, "not uint8"),
        ({"arr_0": np.zeros((0, 8, 8, 3), np.uint8)}, "not uint8"),
        ({"arr_0": np.array([{"code": 1}], object)}, "arr_0 cannot be read .Python objects"),
    ],
)
def test_arrays_that_are_no_reference_batch(tmp_path, whole, change, message):
    path = tmp_path / "batch.npz"
    np.savez(path, **{name: value for name, value in (whole | change).items() if value is not None})
    with pytest.raises(ArtefactError, match=rf"batch\.npz: .*{message}.*an npz of ADM's layout"):
        AdmReference(path)


def test_files_that_are_no_npz(tmp_path, whole):
    with pytest.raises(ArtefactError, match="no such file"):
        AdmReference(tmp_path / "batch.npz")
    (tmp_path / "batch.npz").write_bytes(b"PK not a zip")
    with pytest.raises(ArtefactError, match="not a whole npz file"):
        AdmReference(tmp_path / "batch.npz")
    np.savez_compressed(tmp_path / "whole.npz", **whole)
    content = (tmp_path / "whole.npz").read_bytes()
    (tmp_path / "batch.npz").write_bytes(content[: len(content) // 2])
    with pytest.raises(ArtefactError, match="not a whole npz file"):
        AdmReference(tmp_path / "batch.npz")
    with zipfile.ZipFile(tmp_path / "whole.npz") as archive:
        start = archive.getinfo("sigma.npy").header_offset + 5000
    (tmp_path / "batch.npz").write_bytes(content[:start] + bytes(200) + content[start + 200 :])
    with pytest.raises(ArtefactError, match="not a whole npz file"):
        AdmReference(tmp_path / "batch.npz")


def header(shape, dtype="<f8", version=(1, 0)):
    text = str({"descr": dtype, "fortran_order": False, "shape": shape}).encode() + b"\n"
    size = struct.pack("<H" if version == (1, 0) else "<I", len(text))
    return b"\x93NUMPY" + bytes(version) + size + text


@pytest.mark.parametrize("content", ["bomb", "long header", "negative", "executable", "too many dimensions"])
def test_nothing_is_decompressed_before_it_is_known(tmp_path, whole, content, monkeypatch):
    """A member of a gigabyte of zeros in a file of a megabyte, and headers that lie."""
    members = {
        "bomb": header((2048,)) + bytes(1 << 28),
        "long header": b"\x93NUMPY\x02\x00" + struct.pack("<I", 1 << 28) + b" " * (1 << 28),
        "negative": header((-1, 2048)) + bytes(2048 * 8),
        "executable": header("__import__('os').abort()") + bytes(2048 * 8),
        "too many dimensions": header((2,) * 70) + bytes(64),
    }
    path = tmp_path / "batch.npz"
    np.savez(path, **{name: value for name, value in whole.items() if name != "mu"})
    with zipfile.ZipFile(path, "a", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        archive.writestr("mu.npy", members[content])
    read = []
    plain = zipfile.ZipExtFile.read
    monkeypatch.setattr(zipfile.ZipExtFile, "read", lambda self, n=-1: read.append(n) or plain(self, n))
    with pytest.raises(ArtefactError, match="mu cannot be read"):
        AdmReference(path)
    assert all(0 <= size <= 1 << 16 for size in read)


def test_a_sample_batch_is_numpy_s(tmp_path):
    """What numpy reads back, in ADM's layout; streamed, and the same bytes in any batches."""
    first, second, labels = tmp_path / "first.npz", tmp_path / "second.npz", torch.tensor([3, 1, 4, 1, 5])
    write_batch(first, images(0).split(2), labels, count=5, image_size=8)
    write_batch(second, [images(0)], labels, count=5, image_size=8)
    assert first.read_bytes() == second.read_bytes()
    with np.load(first, allow_pickle=False) as found:
        assert list(found) == ["arr_0", "arr_1"]
        assert found["arr_0"].dtype == np.uint8
        np.testing.assert_array_equal(found["arr_0"], images(0).permute(0, 2, 3, 1))
        np.testing.assert_array_equal(found["arr_1"], labels)
    with zipfile.ZipFile(first) as archive:
        assert archive.testzip() is None
        # Evaluators read members as streams, and some do not inflate.
        assert {info.compress_type for info in archive.infolist()} == {zipfile.ZIP_STORED}
    write_batch(second, images(0).split(3), None, count=5, image_size=8)
    with np.load(second) as found:
        assert list(found) == ["arr_0"]


def test_a_sample_batch_is_whole_or_absent(tmp_path):
    path = tmp_path / "batch.npz"
    for batches, labels, message in (
        ([images(0, 4)], None, "4 images and None labels, announced were 5"),
        ([images(0)], torch.zeros(4), "5 images and 4 labels, announced were 5"),
        ([images(0, 3), images(1, 2, side=9)], None, r"\[2, 3, 9, 9\] among uint8 images \[B, 3, 8, 8\]"),
        ([images(0).float()], None, "a batch of torch.float32"),
    ):
        with pytest.raises(ValueError, match=message):
            write_batch(path, batches, labels, count=5, image_size=8)
        assert list(tmp_path.iterdir()) == []


def test_a_reference_batch_reads_what_was_written(tmp_path, whole):
    """A sample batch becomes a reference batch when statistics are added."""
    path = tmp_path / "batch.npz"
    write_batch(path, images(3).split(2), None, count=5, image_size=8)
    with pytest.raises(ArtefactError, match=r"no mu\.npy"):
        AdmReference(path)
    with zipfile.ZipFile(path, "a") as archive:
        for name in ("mu", "sigma", "mu_s", "sigma_s"):
            with archive.open(f"{name}.npy", "w") as file:
                np.lib.format.write_array(file, whole[name])
    assert torch.equal(torch.cat(list(AdmReference(path).batches(3, range(2)))), images(3))


def test_damage_in_the_images_is_found(tmp_path, whole):
    """They are read after the statistics; a checksum that fails is an error of the file, not of Python."""
    path = tmp_path / "batch.npz"
    np.savez(path, **(whole | arrays(count=40, side=64)))
    content = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as archive:
        content[archive.getinfo("arr_0.npy").header_offset + 300_000] ^= 255
    path.write_bytes(content)
    assert zlib  # the checksum's
    with pytest.raises(ArtefactError, match="not a whole npz file"):
        list(AdmReference(path).batches(7, range(6)))
