"""The study of published checkpoints under real DVC: three folders in the official layout, from their files to the table."""

import pytest
from clone import Clone, Study, ran
from foreign import GOLDEN, official_vtp
from servers import write_imagenet

from vtp import VisualTokenizer, load_tokenizer

pytestmark = pytest.mark.slow
SIZE = 64  # of the golden checkpoints' images
SIZES = {"Small": "vtp-tiny", "Base": "vtp-tiny-layernorm-mlp", "Large": "vtp-tiny-ae"}
RFID = f"reconstruction.validation_centre{SIZE}.pretrained.rfid_efficientnet-lite0-64_16"
GFID = "generation.unguided.gfid_efficientnet-lite0-64_24_unguided_balanced"
METRICS = {
    "zero-shot": "understanding.zero_shot_top1_squash",
    "linear probe": "understanding.linear_probe_multi_best_on_val",
    "rFID": RFID,
    "gFID": GFID,
}


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """After its first run."""
    clone = Clone(tmp_path_factory.mktemp("official") / "clone")
    splits = {"train": {"samples": 40, "kept": 40}, "validation": {"samples": 16}}
    study = Study(
        clone,
        "official_vtp",
        reference={"image_size": SIZE, "splits": splits},
        evaluate_understanding={"probes": {"resize": SIZE, "size": 48, "blocks": [1, 3]}},
        prepare_data={"samples_per_shard": 30},
        summary={"metrics": METRICS, "figure": {"all": {"name": "bars", "y": list(METRICS), "published": "README"}}},
    )
    write_imagenet(study.folder / "data/imagenet", train=12, validation=4)
    for size, golden in SIZES.items():
        official_vtp(study.folder / f"data/VTP-{size}-f16d64", golden)
    study.first = study.dvc("repro")
    return study


def test_from_published_files_to_the_table(study):
    """The table has every run, and what it can compare."""
    done = ran(study.first)
    assert {"prepare_data", *(f"import_tokenizer@{size}" for size in SIZES), "train_generator_large"} <= {
        name.rpartition(":")[2] for name in done
    }
    assert done[-1] == "summary"
    table, _, _, comparison = (study.folder / "work/summary/table.md").read_text().split("\n\n")
    rows = [[cell.strip() for cell in line.strip("| ").split("|")] for line in table.splitlines()]
    assert rows[0] == ["run", "training FLOPs", "seeds", *METRICS]
    assert [row[0] for row in rows[2:]] == sorted(SIZES)
    values = {row[0]: dict(zip(METRICS, row[3:], strict=True)) for row in rows[2:]}
    assert [size for size in values if "-" in values[size].values()] == ["Large"]  # it has no text tower
    rows = [[cell.strip() for cell in line.strip("| ").split("|")] for line in comparison.splitlines()]
    assert rows[0] == ["published", "series", "at", "metric", "value", "here", "difference", "source"]
    assert [row[2:4] for row in rows[2:]] == [[size, name] for name in METRICS for size in SIZES]
    for _, _, size, name, published, measured, difference, _ in rows[2:]:
        assert measured == values[size][name]
        if measured != "-":
            expected = float(measured) - float(published.split()[0])
            assert float(difference) == pytest.approx(expected, abs=2e-3 * float(measured))


def test_the_artefact_is_what_was_published(study):
    for size, golden in SIZES.items():
        published = VisualTokenizer.from_pretrained(GOLDEN / golden)
        assert load_tokenizer(study.folder / f"work/{size}/tokenizer").encoder_digest() == published.encoder_digest()
        facts = study.json(f"work/provenance/tokenizer-{size}.json")["facts"]
        assert facts == {"encoder": published.encoder_digest()}


def test_nothing_changed_nothing_runs(study):
    assert "Data and pipelines are up to date" in study.dvc("repro")
