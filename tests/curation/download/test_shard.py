"""One shard: real img2dataset in a real process, and a real server."""

import io
import re
from functools import partial

import pyarrow.parquet as pq
import pytest
from downloading import SECTION, Row, write_selection
from servers import body, serving
from tiny import merged

from stages.download import Download, job_of
from vtp.curation.download.missing import list_missing
from vtp.curation.download.session import LocalPool
from vtp.curation.download.shard import cause_of, fetch_shard
from vtp.curation.download.store import SUCCESS, Store


@pytest.fixture(scope="module")
def pool(tmp_path_factory):
    with LocalPool(1, tmp_path_factory.mktemp("log") / "log") as pool:
        yield pool


def fetched(pool, config, selection, store):
    """What becomes of the rows of a selection, by shard."""
    missing = list_missing(selection, store, config.terms)
    ended = [pair for pairs in pool.results(partial(fetch_shard, job_of(config)), missing.shards) for pair in pairs]
    return [shard for _, shard in sorted(ended)]


def test_a_shard_is_a_tar_and_the_fate_of_every_row(pool, tmp_path):
    """Its records tell where each picture lies; what a process leaves is in a folder that no other attempt has."""
    config = Download.parse(merged(SECTION, {"rows_per_shard": 3, "resize": {"name": "no"}}), where="")
    store = Store(tmp_path / "store")
    with serving() as server:
        rows = [Row(f"jpeg-{n}", server.url("jpeg", n), "jpeg", None, None) for n in range(3)]
        rows += [Row(f"{kind}-0", server.url(kind), kind, None, None) for kind in ("missing", "html")]
        selection = write_selection(rows, tmp_path / "selection")
        twice = [fetched(pool, config, selection, store) for _ in range(2)]
    for shards in twice:
        assert [len(shard.records) for shard in shards] == [3, 2]
        records = {record.key: (record, shard) for shard in shards for record in shard.records}
        assert {key: record.error for key, (record, _) in records.items() if record.error} == {
            "missing-0": "http 404",
            "html-0": "not an image",
        }
        for key, (record, shard) in records.items():
            if record.status == SUCCESS:
                with shard.tar.open("rb") as tar:
                    tar.seek(record.offset)
                    assert tar.read(record.size)[:3] == b"\xff\xd8\xff"
                    assert record.size < 2 * len(body("jpeg", int(key.split("-")[1])))
    tars = [shard.tar for shards in twice for shard in shards if shard.tar]
    assert len(set(tars)) == len(tars)


def test_another_job_of_the_same_process_has_its_own_policy(pool, tmp_path):
    with serving() as server:
        selection = write_selection([Row("a", server.url("jpeg"), "jpeg", None, None)], tmp_path / "selection")
        for number, networks in enumerate((["127.0.0.1/32"], [], ["127.0.0.1/32"])):
            config = Download.parse(merged(SECTION, {"policy": {"allowed_networks": networks}}), where="")
            (shard,) = fetched(pool, config, selection, Store(tmp_path / str(number)))
            assert (shard.tar is None, shard.records[0].error) == (
                (False, None) if networks else (True, "address refused")
            )


def test_a_tar_says_what_its_pictures_are(pool, tmp_path):
    import webdataset

    store = Store(tmp_path / "store")
    with serving() as server:
        selection = write_selection([Row("a", server.url("jpeg"), "jpeg", None, None)], tmp_path / "selection")
        (shard,) = fetched(pool, Download.parse(SECTION, where=""), selection, store)
    (sample,) = webdataset.WebDataset(str(shard.tar), shardshuffle=False)
    assert sample["txt"].decode() == "a jpeg ü"
    assert pq.read_table(next(store.incoming.glob("*.parquet")))["key"].to_pylist() == ["a"]
    assert io.BytesIO(sample["jpg"]).read(2) == b"\xff\xd8"


@pytest.mark.parametrize(
    ("message", "cause"),
    [
        ("address refused", "address refused"),
        ("http 403", "http 403"),
        ("http 403 and more", "other"),
        ("tls error: self-signed certificate", "tls error"),
        ("bad gateway: BadStatusLine", "bad gateway"),
        ("Use of image disallowed by X-Robots-Tag directive", "opted out"),
        ("sha256 differs", "sha256 differs"),
        ("too many pixels: 9 x 9", "too many pixels"),
        ("not a readable image (OSError: image file is truncated)", "damaged image"),
        ("cannot be resized (its longer side would be too long)", "cannot be resized"),
        ("Invalid IPv6 URL", "bad url"),
        ("'v1' does not appear to be an IPv4 or IPv6 address", "bad url"),
        ("something new: deadline", "other"),
        ("", "other"),
    ],
)
def test_messages_have_causes(message, cause):
    assert cause_of(message) == cause


def test_urls_that_urllib_refuses_itself_are_bad(tmp_path, pool):
    """Before any opener is asked."""
    urls = ["http://[::1/a", "http://[abc]/", "http://[v1]/"]
    rows = [Row(f"r{n}", url, "bad", None, None) for n, url in enumerate(urls)]
    selection = write_selection(rows, tmp_path / "selection")
    (shard,) = fetched(pool, Download.parse(SECTION, where=""), selection, Store(tmp_path / "store"))
    assert {record.url: record.error for record in shard.records} == dict.fromkeys(urls, "bad url")
    assert not any(re.search("0x", record.message or "") for record in shard.records)
