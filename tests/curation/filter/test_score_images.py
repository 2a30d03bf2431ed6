"""Scores in batches of one shape, whatever cannot be read, with and without worker processes, and processes that die."""

import os
import signal

import numpy as np
import pytest
import torch
from measuring import drawn_pool
from torch.utils.data import get_worker_info

from vtp.curation.filter.image_rules import MEASURED, NO_CAPTION, UNREADABLE, ImageJob, sortable
from vtp.curation.filter.score_images import score_images
from vtp.curation.filter.spill import save_array, write_rows
from vtp.processes import WorkerDied

COUNT = 40


class MeanScorer:
    """The mean of an image's top left pixels and the length of its caption, with a record of what came."""

    def __init__(self):
        self.shapes = []

    def prepare(self, image):
        return torch.from_numpy(np.array(image.crop((0, 0, 4, 4)))).permute(2, 0, 1)

    def tokenize(self, captions):
        return torch.tensor([[len(caption)] for caption in captions])

    def score(self, images, tokens):
        self.shapes.append((tuple(images.shape), tuple(tokens.shape)))
        return images.double().mean((1, 2, 3)) - tokens[:, 0]


@pytest.fixture(scope="module")
def jobs(tmp_path_factory):
    """Two pieces, of 30 and 10 images."""
    import pyarrow.parquet as pq

    folder = tmp_path_factory.mktemp("pieces")
    pool = drawn_pool(folder / "pool", COUNT)
    write_rows(folder / "rows.arrow", pq.read_table(pool / "part-00000.parquet"))
    save_array(folder / "kept.npy", np.ones(COUNT, bool))

    def make(into):
        bounds = [(0, 30), (30, COUNT)]
        place = (folder / "rows.arrow", folder / "kept.npy")
        return [ImageJob(into / f"{start}.npy", *place, start, stop, pool, False) for start, stop in bounds]

    return make


@pytest.mark.parametrize("processes", [0, 2])
def test_batches_have_one_shape_and_end_with_the_piece(jobs, tmp_path, monkeypatch, processes):
    monkeypatch.setattr("vtp.curation.filter.score_images.CHUNK", 3)
    scorer, reported = MeanScorer(), []
    score_images(jobs(tmp_path), scorer, batch_size=8, processes=processes, report=reported.append)
    assert reported == [8, 8, 8, 6, 8, 2]
    assert set(scorer.shapes) == {((8, 3, 4, 4), (8, 1))}
    found = np.concatenate([np.load(job.done) for job in jobs(tmp_path)])
    alone = MeanScorer()
    score_images(jobs(tmp_path / "alone"), alone, batch_size=1, processes=0, report=reported.append)
    np.testing.assert_array_equal(found, np.concatenate([np.load(job.done) for job in jobs(tmp_path / "alone")]))
    states = found[:, 1].tolist()
    assert [states.count(state) for state in (UNREADABLE, NO_CAPTION, MEASURED)] == [3, 1, 36]
    assert len(set(found[found[:, 1] == MEASURED, 0].tolist())) > 20


def test_a_code_is_exactly_that_of_the_score(jobs, tmp_path):
    """What is compared with a threshold has no bit rounded away, below zero as above."""
    scorer = MeanScorer()
    scorer.score = lambda images, tokens: torch.full((len(images),), -0.1, dtype=torch.float64)
    score_images(jobs(tmp_path), scorer, batch_size=8, processes=0, report=lambda images: None)
    codes = np.concatenate([np.load(job.done) for job in jobs(tmp_path)])
    assert set(codes[codes[:, 1] == MEASURED, 0].tolist()) == set(sortable(np.array([-0.1])).tolist())


def test_what_ends_a_report_leaves_whole_pieces(jobs, tmp_path):
    """A request to stop is honoured after a batch; the pieces before are there, and the others are done next time."""
    reported = []

    def stop_in_the_second(images):
        reported.append(images)
        if len(reported) == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        score_images(jobs(tmp_path), MeanScorer(), batch_size=8, processes=1, report=stop_in_the_second)
    assert [job.done.exists() for job in jobs(tmp_path)] == [True, False]


def test_a_killed_process_is_an_error_in_words(jobs, tmp_path):
    class DeadlyScorer(MeanScorer):
        def prepare(self, image):
            assert get_worker_info() is not None
            os.kill(os.getpid(), signal.SIGKILL)

    with pytest.raises(WorkerDied, match="a worker process was killed, .*VTP_PROCESSES lower"):
        score_images(jobs(tmp_path), DeadlyScorer(), batch_size=8, processes=1, report=lambda images: None)
