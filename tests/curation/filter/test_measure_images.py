"""Pictures of a filter's rules on several real ranks: the same bytes, whoever measures, waits, hangs or begins again."""

import json

import pytest
from measuring import drawn_pool, filtered, on_ranks, tiny_tokenizer
from sifting import removed, selected

from vtp.artefact import digest

OUTPUTS = ("selection", "funnel", "examples")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A pool, a tokenizer, and what one process makes of them."""
    folder = tmp_path_factory.mktemp("measured")
    drawn_pool(folder / "pool", 40)
    tiny_tokenizer(folder / "tokenizer")
    folder.joinpath("whole.json").write_text(
        json.dumps(filtered(folder / "pool", folder / "tokenizer", folder / "whole"))
    )
    return folder


def digests(folder):
    return {name: digest(folder / name) for name in OUTPUTS}


def pieces(folder):
    return {
        f"{rule.name}/{piece.name}": piece.read_bytes()
        for rule in sorted((folder / "scratch" / "folder").glob("rule-*"))
        for piece in sorted(rule.glob("image-*.npy"))
    }


def test_the_pool_has_something_for_every_rule(folder):
    lines = removed(folder / "whole")
    assert lines["unreadable_image"] == 3
    assert lines["perceptual_duplicates"] >= 3
    assert lines["clip_score"] > 5
    assert len(selected(folder / "whole")) == 12


@pytest.mark.slow
def test_ranks_share_the_pictures_and_wait_for_days(folder):
    """What is between two rules takes longer than ranks wait for each other in a collective."""
    size = 3
    done = on_ranks(size, folder, "late")
    assert done.returncode == 0, done.stderr[-3000:]
    assert digests(folder / "late") == digests(folder / "whole")
    assert pieces(folder / "late") == pieces(folder / "whole")
    taken = [json.loads((folder / f"taken-late-{size}-{rank}.json").read_text()) for rank in range(size)]
    for rule in "01":
        assert all(any(name.startswith(rule) for name in of_rank) for of_rank in taken)
    assert sorted(name for of_rank in taken for name in of_rank) == sorted(
        json.loads((folder / "whole.json").read_text())
    )


@pytest.mark.slow
def test_a_rank_that_hangs_is_told_and_what_it_left_is_done_by_another_number_of_ranks(folder):
    done = on_ranks(2, folder, "hanging")
    assert done.returncode != 0
    assert "no rank has measured an image for 4 s, and up to" in done.stderr
    left = pieces(folder / "hanging")
    assert not (folder / "hanging" / "selection").exists()
    assert len(left) == len(pieces(folder / "whole")) - 1
    again = filtered(folder / "pool", folder / "tokenizer", folder / "hanging")
    assert len(again) == 1
    assert digests(folder / "hanging") == digests(folder / "whole")


@pytest.mark.slow
def test_unreadable_pictures_of_all_ranks_have_one_limit(folder):
    """Whoever read them: three of forty, where 0.06 allows two."""
    done = on_ranks(2, folder, "strict")
    assert done.returncode != 0
    assert "rank 0: 3 of 40 images cannot be read" in done.stderr
    assert "rank 1" not in done.stderr.split("cannot be read")[0]
