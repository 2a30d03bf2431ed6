"""CLIP score and retrieval of embeddings that are given, against closed forms."""

import numpy as np
import pytest
import torch
from prompted import given_scorer, numbered

from vtp.evaluation.prompt_clip import ClipMeasure, RetrievalConfig, _candidates, retrieval


def among(count, seed=0):
    return RetrievalConfig(among=count, seed=seed)


def of_cosines(cosines):
    """One picture, and captions in float64 that it has these cosines with; all are unit vectors."""
    cosines = torch.tensor(cosines, dtype=torch.float64)
    return torch.tensor([[1.0, 0.0]], dtype=torch.float64), torch.stack([cosines, (1 - cosines.square()).sqrt()], 1)


@pytest.mark.parametrize("place", range(8))
def test_a_prompt_is_found_as_far_down_as_its_cosine_stands(place):
    image, captions = of_cosines([0.9, 0.7, 0.5, 0.3, 0.1, -0.1, -0.3, -0.5])
    found = retrieval(image, captions, torch.tensor([place]), among(8), first=4)
    assert found.dtype == torch.float64
    assert found.tolist() == [[place == 0, place < 5]]


@pytest.mark.parametrize(
    ("cosines", "first", "five"),
    [
        ([0.5] * 8, 1 / 8, 5 / 8),  # all alike: chance
        ([0.5, 0.5, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1], 1 / 2, 1.0),
        ([0.5, 0.9, 0.9, 0.9, 0.5, 0.5, 0.1, 0.1], 0.0, 2 / 3),  # two places for three
        ([0.5, 0.9, 0.9, 0.9, 0.9, 0.9, 0.5, 0.5], 0.0, 0.0),
    ],
)
def test_equal_cosines_share_their_places(cosines, first, five):
    image, captions = of_cosines(cosines)
    found = retrieval(image, captions, torch.tensor([0]), among(8), first=0)
    np.testing.assert_allclose(found, [[first, five]], rtol=1e-12)


def test_only_those_that_are_drawn_compete():
    """Every picture is the caption that follows its own: it is missed where that one is drawn."""
    captions, asked = torch.eye(40, dtype=torch.float64), torch.arange(200) % 40
    images = captions[(asked + 1) % 40]
    found = retrieval(images, captions, asked, among(10), first=1000)
    drawn = [
        (own + 1) % 40 in _candidates(number, own, 40, among(10)) for number, own in enumerate(asked.tolist(), 1000)
    ]
    assert 20 < sum(drawn) < 70  # 9 of 39
    expected = [[0.0, 4 / 9] if rival else [1 / 10, 5 / 10] for rival in drawn]  # the others are all at 0
    np.testing.assert_allclose(found, expected, rtol=1e-12)


def test_candidates_are_a_function_of_seed_and_number():
    chosen = [_candidates(number, 7, 30, among(10, seed=1)) for number in range(300)]
    assert chosen == [_candidates(number, 7, 30, among(10, seed=1)) for number in range(300)]
    assert chosen[3] != _candidates(3, 7, 30, among(10, seed=2))
    assert len(set(map(tuple, chosen))) == 300
    for numbers in chosen:
        assert numbers[0] == 7
        assert len(set(numbers)) == 10
        assert set(numbers) <= set(range(30))
    counts = np.bincount(np.concatenate([numbers[1:] for numbers in chosen]), minlength=30)
    assert counts[7] == 0
    expected = 300 * 9 / 29
    assert np.abs(np.delete(counts, 7) - expected).max() < 5 * expected**0.5


def test_figures_are_those_of_the_embeddings():
    draws = torch.Generator().manual_seed(1)
    images, captions = (torch.nn.functional.normalize(torch.randn(30, 6, generator=draws), dim=1) for _ in range(2))
    texts = [str(number) for number in range(30)]
    measure = ClipMeasure("given", given_scorer(images, captions), texts, among(30))
    for first in (0, 7, 14, 21):
        measure.add(numbered(range(first, first + 7)), texts[first : first + 7])
    cosines = images[:28].double() @ captions.double().T
    places = (cosines > cosines.diagonal()[:, None]).sum(1)
    expected = {
        "clip_score_given": cosines.diagonal().mean().item(),
        "retrieval_r1_of30_given": (places < 1).double().mean().item(),
        "retrieval_r5_of30_given": (places < 5).double().mean().item(),
    }
    found = measure.figures()
    assert found.keys() == expected.keys()
    assert found == pytest.approx(expected, abs=1e-7)
    assert 0 < found["retrieval_r5_of30_given"] < 1
    measure.add(numbered([29]), ["29"])  # of another set
    alone = (images[29] * captions[29]).sum().item()
    assert measure.figures()["clip_score_given"] == pytest.approx(alone, abs=1e-7)


def test_a_cosine_below_zero_stays_below_zero():
    measure = ClipMeasure("given", given_scorer(-torch.eye(2), torch.eye(2)), ["0", "1"], None)
    measure.add(numbered([0, 1, 0]), ["0", "1", "1"])
    assert measure.figures() == {"clip_score_given": pytest.approx(-2 / 3)}


def test_prompts_that_the_tower_reads_alike_are_equally_near():
    """Its tokenizer drops what tells them apart; that they stand at other places of a batch must not."""
    captions, texts = torch.eye(8), [f"{number}{end}" for number in range(8) for end in ("", " ")]
    scorer = given_scorer(captions, captions)
    scorer._model.encode_text = lambda tokens: captions[tokens[:, 0]] + 1e-3 * torch.rand(len(tokens), 8)
    measure = ClipMeasure("given", scorer, texts, among(16))
    measure.add(numbered([3]), ["3 "])
    found = measure.figures()
    assert (found["retrieval_r1_of16_given"], found["retrieval_r5_of16_given"]) == (0.5, 1.0)


def test_what_cannot_be_measured_is_refused():
    measure = ClipMeasure("given", given_scorer(torch.eye(2), torch.eye(2)), ["0", "1"], None)
    with pytest.raises(ValueError, match="'2' is none of the 2 prompts"):
        measure.add(numbered([0, 1]), ["0", "2"])
    with pytest.raises(TypeError, match="as uint8, given torch.float32"):
        measure.add(numbered([0]).float(), ["0"])
    with pytest.raises(ValueError, match=r"2 prompts need as many images \[B, 3, H, W\], given \[1, 3, 1, 1\]"):
        measure.add(numbered([0]), ["0", "1"])
    with pytest.raises(ValueError, match="no pictures"):
        measure.figures()
    broken = ClipMeasure("broken", given_scorer(torch.eye(2) / 0, torch.eye(2)), ["0"], None)
    with pytest.raises(ValueError, match="image embeddings of broken hold NaN"):
        broken.add(numbered([0]), ["0"])
