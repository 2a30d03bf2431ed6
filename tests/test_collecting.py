"""The two studies that begin with real data, under real DVC: a web of pictures and an object store on loopback."""

import os
import shutil
from collections import Counter

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from clone import Clone, Study, ran
from servers import bad_rows, serving, write_imagenet, write_metadata

from vtp.artefact import digest
from vtp.data.dataset import ShardDataset

pytestmark = pytest.mark.slow
GOOD, MORE = 240, 40
BAD = {"missing": 30, "html": 10, "noai": 10}  # of awkward pages, by their names on the server


@pytest.fixture(scope="module")
def web():
    with serving() as server:
        yield server


@pytest.fixture(scope="module")
def lake(web, tmp_path_factory):
    """An object store with the metadata of the web, in two files."""
    import fsspec
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    address = f"http://127.0.0.1:{server._server.server_port}"
    names = {"AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b", "AWS_DEFAULT_REGION": "us-east-1"}
    patch = pytest.MonkeyPatch()
    for name, value in (names | {"AWS_ENDPOINT_URL": address}).items():
        patch.setenv(name, value)
    bucket = fsspec.filesystem("s3", skip_instance_cache=True)
    bucket.mkdir("lake")
    folder = tmp_path_factory.mktemp("metadata")
    write_metadata(folder / "all.parquet", web, GOOD + MORE)
    table = pq.read_table(folder / "all.parquet")
    scores = pa.array([0.1] * 20 + [0.3] * (GOOD + MORE - 20), pa.float32())  # the first score too low
    table = table.set_column(table.schema.names.index("clip_l14_similarity_score"), "clip_l14_similarity_score", scores)
    parts = {"good": table[:GOOD], "bad": bad_rows(web, table.schema, BAD), "more": table[GOOD:]}
    for name, part in parts.items():
        pq.write_table(part, folder / f"{name}.parquet")
    for name in ("good", "bad"):
        bucket.put(str(folder / f"{name}.parquet"), f"lake/metadata/{name}.parquet")
    yield bucket, folder, address
    patch.undo()
    server.stop()


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    return Clone(tmp_path_factory.mktemp("collecting") / "clone")


@pytest.fixture(scope="module")
def datacomp(clone, lake):
    """The study after its first run; its metadata come from the object store, which is also the team's remote."""
    _, _, address = lake
    study = Study(
        clone,
        "datacomp",
        pretrain={"monitor": {"probe": None}},
        download={"rows_per_shard": 50, "retries": 0},
    )
    clone.git("add", "-A")
    clone.git("-c", "user.name=t", "-c", "user.email=t@t", "commit", "-qm", "start")
    study.dvc("remote", "add", "-d", "team", "s3://lake/cache")
    study.dvc("remote", "modify", "team", "endpointurl", address)
    study.dvc("remote", "add", "lake", "s3://lake")
    study.dvc("remote", "modify", "lake", "endpointurl", address)
    (study.folder / "data").mkdir()
    study.dvc("import-url", "remote://lake/metadata", "data/metadata")
    study.first = study.dvc("repro")
    return study


def test_from_urls_to_a_tokenizer(datacomp, web):
    """Funnels, outcomes by cause and the manifest add up to the last row."""
    assert ran(datacomp.first) == ["check", "filter_metadata", "download", "filter_images", "prepare_data", "pretrain"]
    rows = GOOD + sum(BAD.values()) + 2
    metadata = datacomp.json("metrics/filter_metadata.json")["filter"]
    assert metadata["rows_in"] == rows
    wanted = metadata["rows_out"]
    assert wanted == rows - 20 - 2
    download = datacomp.json("metrics/download.json")["download"]
    assert download["rows"] == wanted
    assert download["success"] == GOOD - 20
    assert download["causes"] == {"http 404": 30, "not an image": 10, "opted out": 10}
    images = datacomp.json("metrics/filter_images.json")["filter"]
    assert images["rows_in"] == wanted
    manifest = datacomp.json("work/shards/manifest.json")["splits"]
    assert manifest["train"]["samples"] + manifest["validation"]["samples"] == images["rows_out"]
    assert manifest["train"]["share_without_caption"] == 0
    assert (datacomp.folder / "work/tokenizer/model.safetensors").exists()
    shown = ShardDataset(datacomp.folder / "work/shards", "train")
    number = int(shown.caption(0).split()[2])
    assert shown.manifest.source == "pool"
    assert max(shown.image(0).size) == 64
    assert Counter(web.requests)[f"/photo/{number}"] == 1
    assert "rectangles" in (datacomp.folder / "work/funnels/metadata.md").read_text()


def test_nothing_changed_nothing_runs(datacomp):
    assert "Data and pipelines are up to date" in datacomp.dvc("repro")


def test_more_rows_fetch_what_is_new(datacomp, lake, web):
    """The store grows at the other end; `dvc update` sees it, and no page is asked for again."""
    bucket, folder, _ = lake
    asked = len(web.requests)
    bucket.put(str(folder / "more.parquet"), "lake/metadata/more.parquet")
    datacomp.dvc("update", "data/metadata.dvc")
    output = datacomp.dvc("repro")
    assert ran(output)[:2] == ["filter_metadata", "download"]
    new = web.requests[asked:]
    assert sorted(new) == sorted(f"/photo/{n}" for n in range(GOOD, GOOD + MORE))
    assert datacomp.json("metrics/download.json")["download"]["success"] == GOOD - 20 + MORE


def test_a_team_shares_what_was_made(datacomp, lake):
    """Pushed to the object store, lost here, pulled again; and a second cache needs no second copy of the bytes."""
    folder = datacomp.folder
    before = {name: digest(folder / "work" / name) for name in ("shards", "pool", "tokenizer")}
    datacomp.dvc("push", "-R", ".")
    shutil.rmtree(folder / "work")
    shutil.rmtree(datacomp.clone.folder / ".dvc/cache")
    datacomp.dvc("pull", "-R", ".")
    assert {name: digest(folder / "work" / name) for name in before} == before
    assert "Data and pipelines are up to date" in datacomp.dvc("repro")
    tar = next((folder / "work/shards").glob("*.tar"))
    assert os.stat(tar).st_nlink > 1  # one file here and in the cache


def test_spark_collects_the_same(datacomp, tmp_path, monkeypatch):
    """What comes before the training, anew: passes of the filters and shards of the download as tasks of Spark."""
    kept = ("wanted", "shards")
    before = {name: digest(datacomp.folder / "work" / name) for name in kept}
    outcome = datacomp.json("metrics/download.json")["download"]
    settings = {"VTP_SPARK": "local[2]", "VTP_FRESH": "1", "VTP_DOWNLOAD_STORE": str(tmp_path / "store")}
    for name, value in (settings | {"SPARK_LOCAL_IP": "127.0.0.1"}).items():
        monkeypatch.setenv(name, value)
    conf = {"spark.driver.memory": "512m"}
    datacomp.write(
        {"download": {"distributor": {"name": "pyspark", "master": "local[2]", "threads": 16, "conf": conf}}}
    )
    assert ran(datacomp.dvc("repro", "-f", "prepare_data"))[1:] == [
        "filter_metadata",
        "download",
        "filter_images",
        "prepare_data",
    ]
    assert datacomp.json("metrics/download.json")["download"]["causes"] == outcome["causes"]
    assert datacomp.json("metrics/download.json")["download"]["success"] == outcome["success"]
    assert {name: digest(datacomp.folder / "work" / name) for name in kept} == before


def test_imagenet_from_folders_to_figures(clone):
    """Four classes as ImageNet names them, through every stage."""
    study = Study(clone, "imagenet", prepare_data={"samples_per_shard": 30})
    write_imagenet(study.folder / "data/imagenet", train=24, validation=8)
    output = study.dvc("repro")
    assert ran(output)[0:2] == ["check", "prepare_data"]
    manifest = study.json("work/shards/manifest.json")
    assert manifest["classes"] == ["tench", "goldfish", "tabby cat", "chainsaw"]
    assert manifest["splits"]["train"]["class_counts"] == [24] * 4
    assert study.json("work/metrics/understanding.json")["understanding"]["chance"] == 0.25
    assert (study.folder / "work/report/report.html").exists()
