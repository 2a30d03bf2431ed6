"""Pieces of files where tables of strangers say that they lie."""

import math
import os
from decimal import Decimal

import pytest

from vtp.curation.places import open_inside, read_piece
from vtp.layers.decode import DecodeError


@pytest.fixture
def folder(tmp_path):
    root = tmp_path / "pool"
    (root / "tars").mkdir(parents=True)
    (root / "tars" / "a.tar").write_bytes(bytes(range(100)))
    (tmp_path / "secret").write_bytes(b"secret")
    return root


def opened(folder, file, **how):
    return open_inside(folder, file, "the pool", **({"outside_links": False} | how))


def test_pieces_are_read(folder):
    file = opened(folder, "tars/a.tar")
    assert read_piece(file, 3, 4) == bytes([3, 4, 5, 6])
    assert read_piece(file, 3.0, 4.0) == bytes([3, 4, 5, 6])  # of a column that had nulls
    assert read_piece(file, 100, 0) == b""


@pytest.mark.parametrize(
    ("offset", "size"),
    [
        (-1, 4),
        (0, -1),
        (-4, -4),
        (0, 101),
        (97, 4),
        (2**63, 1),
        (1, 2**63),
        (2**64 - 1, 2),
        (10**400, 1),
        (None, 4),
        (4, None),
        (math.nan, 4),
        (0, math.inf),
        (0.5, 4),
        ("0", 4),
        (b"0", 4),
        (True, 4),
        (Decimal(0), 4),
        ([0], 4),
    ],
)
def test_numbers_that_are_none_are_refused(folder, offset, size):
    with pytest.raises(DecodeError, match="no whole number|begins after it or ends before it"):
        read_piece(opened(folder, "tars/a.tar"), offset, size)


@pytest.mark.parametrize(
    ("file", "why"),
    [
        ("../secret", "outside of the pool"),
        ("tars/../../secret", "outside of the pool"),
        ("/etc/hostname", "outside of the pool"),
        ("", "outside of the pool"),
        ("tars/a.tar\0.png", "its path holds NUL"),
        ("tars/\ud800", "half of a character"),
        ("tars", "no file"),
        ("tars/pipe", "no file"),
        ("tars/out", "a link leads outside of the pool; .*`outside_links: true`"),
        ("away/secret", "a link leads outside of the pool"),
    ],
)
def test_what_is_no_file_inside_is_refused(folder, file, why):
    os.mkfifo(folder / "tars" / "pipe")
    (folder / "tars" / "out").symlink_to(folder.parent / "secret")
    (folder / "away").symlink_to(folder.parent)
    with pytest.raises(DecodeError, match=why):
        opened(folder, file)


def test_links_inside_and_those_that_are_allowed_are_followed(folder):
    (folder / "b.tar").symlink_to("tars/a.tar")
    (folder / "out").symlink_to(folder.parent / "secret")
    (folder.parent / "other").symlink_to(folder)  # the root itself may be a link
    assert read_piece(opened(folder, "b.tar"), 0, 1) == b"\0"
    assert read_piece(opened(folder.parent / "other", "tars/a.tar"), 1, 1) == b"\1"
    assert read_piece(opened(folder, "out", outside_links=True), 0, 6) == b"secret"
    (folder / "loop").symlink_to("loop")
    with pytest.raises(OSError, match="symbolic links"):
        opened(folder, "loop")
