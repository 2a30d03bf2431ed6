"""Parameters and errors of the stage download."""

import pyarrow.parquet as pq
import pytest
from downloading import SECTION, SPARK, Row, write_selection
from tiny import merged

from stages.download import Download, DownloadError, job_of, pool_of, require_packages, run, too_few
from stages.runner.environment import LocalHost, Runtime
from vtp.config import Config, ConfigError
from vtp.curation.download.pool import DownloadReport


def parsed(**changes):
    return Download.parse(merged(SECTION, changes), where="params.yaml:download")


def test_every_parameter_is_read(tmp_path, monkeypatch):
    """Those of the policy act in the opener, whose tests show each."""
    read: set[tuple[str, str]] = set()
    plain = Config.__getattribute__

    def recording(self, name):
        read.add((type(self).__name__, name))
        return plain(self, name)

    variants = [
        parsed(),
        parsed(resize={"name": "no"}, encoding={"name": "png", "compression": 6}, distributor=SPARK),
    ]
    for pool in ("LocalPool", "spark_pool"):  # which have tests of their own
        monkeypatch.setattr(f"stages.download.{pool}", lambda *arguments: arguments)
    monkeypatch.setattr(Config, "__getattribute__", recording)
    for config in variants:
        job_of(config)
        pool_of(config.distributor, tmp_path / "log")
        too_few(DownloadReport(), config)
        assert config.terms
        assert config.identity
    monkeypatch.undo()
    records = (variants[0], *(getattr(v, part) for v in variants for part in ("resize", "encoding", "distributor")))
    fields = {(type(record).__name__, name) for record in records for name in type(record).model_fields}
    assert fields - read == set()


def test_the_store_is_that_of_what_a_picture_depends_on():
    same = [parsed(), parsed(retries=5, retry_failed=3, min_success=0.9, distributor=SPARK, rows_per_shard=7)]
    same += [parsed(policy={"deadline": 60.0, "max_bytes": 5}, respect_opt_out=SECTION["respect_opt_out"][::-1])]
    others = [
        parsed(encoding={"name": "webp", "quality": 95}),
        parsed(respect_opt_out=[]),
        parsed(user_agent_token="a"),
    ]
    others += [parsed(resize={"name": "no"}), parsed(policy={"allowed_networks": []})]
    assert len({config.identity for config in same}) == 1
    assert len({config.identity for config in (*same, *others)}) == 1 + len(others)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"distributor": SPARK | {"proxy": None}}, "distributor.proxy: unknown key"),
        ({"policy": {"allowed_networks": ["127.0.0.1/8"]}}, "has host bits set"),
        ({"policy": {"allowed_ports": [0]}}, "policy.allowed_ports.0"),
        ({"encoding": {"name": "gif", "quality": 95}}, "download.encoding"),
        ({"encoding": {"name": "png", "compression": 95}}, "less than or equal to 9"),
        ({"resize": {"name": "no", "size": 5}}, "resize.size: unknown key"),
        ({"max_pixels": 90_000_000}, "max_pixels"),
        ({"user_agent_token": "my\nbot"}, "user_agent_token"),
    ],
)
def test_impossible_parameters_are_told(changes, said):
    with pytest.raises(ConfigError) as error:
        parsed(**changes)
    assert said in str(error.value)


def test_missing_packages_are_named(monkeypatch):
    require_packages(parsed(distributor=SPARK))
    for name, extra in (("pyspark", "spark"), ("imghdr", "download"), ("img2dataset", "download")):
        monkeypatch.setattr("stages.download.find_spec", lambda asked, name=name: None if asked == name else asked)
        with pytest.raises(ConfigError, match=rf"{name} is not installed here: pip install -e '.\[{extra}\]'"):
            require_packages(parsed(distributor=SPARK))
        if extra == "spark":
            require_packages(parsed())


def test_an_empty_selection_is_an_error(tmp_path):
    host = LocalHost(tmp_path / "download" / "run" / "folder", tmp_path, Runtime(download_store=str(tmp_path / "pool")))
    selection = write_selection([Row("a", "http://127.0.0.1/", "a", None, None)], tmp_path / "selection")
    path = selection / "part-00000.parquet"
    pq.write_table(pq.read_table(path).slice(1), path)
    with pytest.raises(DownloadError, match="no rows; the filter before it let none pass"):
        run(parsed(), selection=selection, pool=tmp_path / "a", report=tmp_path / "b", errors=tmp_path / "c", host=host)
    assert [path.name.split("-")[0] for path in (tmp_path / "pool").iterdir()] == ["store"]
