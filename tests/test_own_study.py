"""The study of own pictures under real DVC, as a newcomer runs it: one edit, then the report."""

import pytest
from clone import Clone, Study, ran
from PIL import Image
from tiny import SMALL

from vtp.config import read_yaml

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """Sixty pictures of odd sizes without classes or captions, outside of the repository, in a folder with a space."""
    root = tmp_path_factory.mktemp("own")
    pictures = root / "my pictures"
    pictures.mkdir()
    for index in range(60):
        name = f"写真 {index}.{'png' if index % 2 else 'jpg'}"
        Image.new("RGB", (20 + index % 13, 19 + index % 7), (index * 4, 255 - index, 90)).save(pictures / name)
    clone = Clone(root / "clone")
    small = {"splits": {"train": {"samples": None, "kept": None}}}
    study = Study(clone, "own_data", prepare_data={"image": {"size": 32}}, reference=SMALL["reference"] | small)
    probe = {"probe": None, "milestones": []}
    study.values["pretrain"]["monitor"] |= probe
    study.values["evaluate_generator"]["kernel"] = None
    study.write({})
    return study, pictures


def test_one_edit_leads_to_the_report(study):
    study, pictures = study
    assert read_yaml(study.folder / "params.yaml")["pictures"] == "data/pictures"
    assert "data/pictures" in study.dvc("repro", status=255)  # DVC says what is not there, before anything is trained
    study.write({"pictures": str(pictures)})
    output = study.dvc("repro")
    assert ran(output)[-1] == "report"
    manifest = study.json("work/shards/manifest.json")
    assert (manifest["classes"], sum(split["samples"] for split in manifest["splits"].values())) == ([], 60)
    assert study.json("work/generator/config.json")["vtp_pipeline"]["classes"] == ["all"]
    assert "have no classes" in study.json("work/metrics/understanding.json")["understanding"]["not_measured"]
    page = (study.folder / "work/report/report.html").read_text()
    assert "without captions, and so without clip" in page
    assert "the data have no classes" in page
    assert "Data and pipelines are up to date" in study.dvc("status")
    Image.new("RGB", (30, 30)).save(pictures / "new.png")
    assert "changed" in study.dvc("status")  # new pictures are seen
