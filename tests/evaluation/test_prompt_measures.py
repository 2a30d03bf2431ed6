"""The measures that parameters name, by tiny models, against these models asked directly; and over two real ranks."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import prompted
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from scoring import ARCHITECTURE, FILE, open_clip_model, write_open_clip, write_tokenizer

from vtp.artefact import ArtefactError, digest
from vtp.config import ConfigError
from vtp.evaluation.prompt_measures import PromptFollowing, build_measures, measure_facts
from vtp.models.tokenizer import VisualTokenizer

PROMPTS = ["a red square", "a dog", "the sea at night", "two cats", 'the word "owl"', "blue", "a tree", "last"]
NOTHING = {"clip_scores": [], "retrieval": None, "ocr": None, "scenes": False}


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    folder = tmp_path_factory.mktemp("weights")
    write_open_clip(folder)
    return folder


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "tokenizer"
    write_tokenizer(folder)
    return folder


@pytest.fixture
def build(weights, tokenizer):
    def measures(given=(), **values):
        config = PromptFollowing.parse(NOTHING | values, where="prompt_following")
        places = {
            "weights": weights,
            "tokenizer": tokenizer,
            "own": lambda _: False,
            "scenes": None,
            "prompts": PROMPTS,
        }
        return build_measures(config, device="cpu", **places | dict(given))

    return measures


def pictures(side):
    draws = np.random.default_rng(0)
    return [Image.fromarray(draws.integers(0, 255, (side, side, 3), dtype=np.uint8)) for _ in PROMPTS]


@pytest.mark.parametrize("side", [16, 40])
@torch.no_grad()
def test_figures_are_those_of_the_models(build, weights, tokenizer, side):
    import open_clip

    network, _, preprocess = open_clip.create_model_and_transforms(ARCHITECTURE, str(weights / FILE))
    ours = VisualTokenizer.from_pretrained(tokenizer)
    models = {
        ARCHITECTURE: (network.eval(), preprocess, open_clip.get_tokenizer(ARCHITECTURE)),
        "tokenizer": (ours, lambda image: ours.preprocess(image)[0], ours.tokenize),
    }
    models_config = [{"name": "tokenizer"}, open_clip_model(weights)]
    measures = build(clip_scores=models_config, retrieval={"among": 8, "seed": 0})
    images = pictures(side)
    batch = torch.from_numpy(np.stack([np.array(image) for image in images])).permute(0, 3, 1, 2)
    found = {}
    for measure in measures:
        for first in (0, 5):
            measure.add(batch[first : first + 5], PROMPTS[first : first + 5])
        found |= measure.figures()
    assert len(found) == 6
    for name, (model, prepare, tokenize) in models.items():
        of_images = F.normalize(model.encode_image(torch.stack([prepare(image) for image in images])), dim=1)
        cosines = (of_images @ F.normalize(model.encode_text(tokenize(PROMPTS)), dim=1).T).double()
        places = (cosines > cosines.diagonal()[:, None]).sum(1)
        assert found[f"clip_score_{name}"] == pytest.approx(cosines.diagonal().mean().item(), abs=1e-6)
        for k in (1, 5):
            assert found[f"retrieval_r{k}_of8_{name}"] == pytest.approx((places < k).double().mean().item(), abs=1e-12)


@pytest.mark.parametrize("index", [0, 1])
def test_the_teacher_of_the_generator_is_marked(build, weights, tokenizer, index):
    models = [{"name": "tokenizer"}, open_clip_model(weights)]
    parsed = PromptFollowing.parse(NOTHING | {"clip_scores": models}, where="p").clip_scores
    names = ["clip_score_tokenizer", f"clip_score_{ARCHITECTURE}"]
    names[index] += "_own"
    found = []
    for measure in build({"own": lambda model: model == parsed[index]}, clip_scores=models):
        measure.add(torch.zeros(1, 3, 16, 16, dtype=torch.uint8), PROMPTS[:1])
        found += measure.figures()
    assert found == names


def test_facts_name_what_measures(weights, tokenizer):
    values = NOTHING | {"clip_scores": [{"name": "tokenizer"}, open_clip_model(weights)], "ocr": {"name": "rapidocr"}}
    facts = measure_facts(PromptFollowing.parse(values, where="p"), tokenizer=tokenizer)
    assert list(facts) == ["tokenizer", ARCHITECTURE, "rapidocr3p10"]
    assert facts[ARCHITECTURE] == digest(weights / FILE)


def test_scenes_are_measured_by_what_is_given(build):
    class Scenes:
        def add(self, images, prompts): ...

        def figures(self):
            return {"scene_accuracy": 1.0}

    scenes = Scenes()
    assert build({"scenes": scenes}, scenes=True) == [scenes]
    assert build({"scenes": scenes}) == []
    with pytest.raises(ConfigError, match="scenes: .* set it to false"):
        build(scenes=True)


def test_what_cannot_be_measured_is_told_before_a_model_is_loaded(build, weights, tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("loaded")

    monkeypatch.setattr("vtp.evaluation.prompt_measures.build_scorer", refuse)
    ours, theirs = {"name": "tokenizer"}, open_clip_model(weights)
    with pytest.raises(ConfigError, match="retrieval.among asks for 9 different prompts, there are 8; lower it"):
        build({"prompts": PROMPTS * 2}, clip_scores=[ours], retrieval={"among": 9, "seed": 0})
    with pytest.raises(ConfigError, match="ocr reads words that prompts put in quotes, and none of 4 does"):
        build({"prompts": PROMPTS[:4]}, ocr={"name": "rapidocr"})
    with pytest.raises(ConfigError, match="clip_scores scores with a tokenizer: give the command --tokenizer"):
        build({"tokenizer": None}, clip_scores=[ours])
    write_tokenizer(tmp_path / "mute", text=None)
    with pytest.raises(ConfigError, match="mute: this tokenizer has no text tower.*; clip_scores needs one"):
        build({"tokenizer": tmp_path / "mute"}, clip_scores=[ours])
    with pytest.raises(ArtefactError, match="none.pt: no such weights; .* or choose another model for clip_scores"):
        build(clip_scores=[ours, theirs | {"weights": "none.pt"}])
    monkeypatch.setitem(sys.modules, "rapidocr", None)
    with pytest.raises(ConfigError, match="rapidocr is not installed"):
        build(clip_scores=[ours], ocr={"name": "rapidocr"})


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"clip_scores": [{"name": "tokenizer"}] * 2}, "two models are called tokenizer in metrics"),
        ({"retrieval": {"among": 10, "seed": 0}}, "retrieval is by the models of clip_scores, which names none"),
        ({"clip_scores": [{"name": "tokenizer"}], "retrieval": {"among": 5, "seed": 0}}, "retrieval.among"),
        ({"ocr": {"name": "tesseract"}}, "ocr.name"),
    ],
)
def test_parameters_that_cannot_be(values, message):
    with pytest.raises(ConfigError, match=message):
        PromptFollowing.parse(NOTHING | values, where="prompt_following")


def test_two_ranks_measure_and_write_what_one_does(tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    two.mkdir()
    tests = Path(prompted.__file__).parent
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(tests.parent), *sys.path]), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, prompted.__file__, str(two)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    alone = prompted.work(one)
    assert len(alone) == 6
    assert [torch.load(two / f"figures-{rank}.pt", weights_only=True) for rank in range(2)] == [alone] * 2
    assert 0 < alone["retrieval_r1_of12_given"] < alone["retrieval_r5_of12_given"] < 1
    assert 0 < alone["word_accuracy_misreader1p0"] < alone["character_accuracy_misreader1p0"] < 1
    for form in ("geneval", "dpg"):
        assert digest(one / form) == digest(two / form)
    assert not list((two / "scratch").rglob("*.png"))
