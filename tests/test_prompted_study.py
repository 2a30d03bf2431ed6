"""Text-to-image under real DVC at tiny size: from captions to what samples of held-out prompts show."""

import pytest
from clone import Clone, Study, ran
from tiny import SMALL

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """The run whose text tower reads the captions, at its last point."""
    clone = Clone(tmp_path_factory.mktemp("prompted") / "clone")
    source = {"classes": 6, "train_samples": 96, "validation_samples": 48, "image_size": 32}
    study = Study(
        clone,
        "text_to_image",
        prepare_data={"source": source, "samples_per_shard": 48},
        train_detector={"training": {"length": {"samples": 64}}, "validation_samples": 12},
        reference={"image_size": 32, "splits": {"train": {"samples": 40, "kept": 0}, "validation": {"kept": 40}}},
        pretrain={
            "tokenizer": SMALL["pretrain"]["tokenizer"] | {"image_size": 32},
            "data": {"clip_view": {"size": 32}},
            "monitor": {"probe": None, "milestones": ["end"]},
        },
        generate={"prompts": {"most": 20}},
        evaluate_generator={"prompts": {"retrieval": {"among": 6}}},
    )
    study.values |= {"runs": {"clip": study.values["runs"]["clip"]}, "points": ["end"]}
    metrics = study.values["summary"]["metrics"]
    study.values["summary"]["metrics"] = {
        name: path and path.replace("_512_", "_24_").replace("_of100_", "_of6_") for name, path in metrics.items()
    }
    study.values["summary"]["claims"] = {}
    study.write({})
    return study


def test_samples_are_judged_by_what_their_prompts_say(study):
    output = study.dvc("repro")
    assert ran(output)[-1] == "summary"
    assert {"cache_captions", "train_detector"} < set(ran(output))
    figures = study.json("work/points/clip/0/end/generation.json")["generation"]
    for row in ("guided", "unguided", "reconstructed", "real"):
        assert 0 <= figures[row]["object_accuracy"] <= 1
        assert figures[row]["retrieval_r5_of6_tokenizer_own"] >= figures[row]["retrieval_r1_of6_tokenizer_own"]
        assert figures[row]["prompts_with_words"] > 0
    assert (study.folder / "work/summary/prompts_guided.png").exists()
    encoder = study.json("work/clip/0/end/generator/text_encoder.json")
    assert encoder == study.json("work/captions/config.json")["text_encoder"]
    assert "up to date" in study.dvc("status")
