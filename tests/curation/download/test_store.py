"""The store, what a selection misses in it, and the pool."""

import csv

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from vtp.artefact import ArtefactError
from vtp.curation.download.missing import Terms, list_missing
from vtp.curation.download.pool import write_pool
from vtp.curation.download.store import FAILED, SHA256_DIFFERS, SUCCESS, DownloadRecord, Store, fetchable
from vtp.curation.rows import order_of

TERMS = Terms(verify_sha256=True, retry_failed=0, rows_per_shard=4)


def table(keys, **columns):
    """Rows of a selection, in order."""
    keys = sorted(keys, key=lambda key: int(order_of([key])[0]))
    values = {"key": keys, "url": [f"http://a/{key}" for key in keys], "sha256": [None] * len(keys)} | columns
    return pa.table(values | {"order": order_of(keys)}, schema=None).cast(
        pa.schema([(name, pa.uint64() if name == "order" else pa.string()) for name in [*values, "order"]])
    )


def select(folder, keys, **columns):
    folder.mkdir()
    pq.write_table(table(keys, **columns), folder / "part-00000.parquet", row_group_size=3)
    return folder


def record(key, status=SUCCESS, attempt=1, **facts):
    more = {"error": "http 404"} if status == FAILED else {"size": 1, "offset": 0, "tar": "tars/a.tar", "sha256": "cc"}
    return DownloadRecord(key, f"http://a/{key}", int(order_of([key])[0]), "", attempt, status)._replace(
        **(more | facts)
    )


def listed(missing):
    """Rows that are to be fetched, by shard."""
    return [pq.read_table(path).to_pylist() for path in missing.shards]


def attempts(missing):
    return {row["key"]: row["attempt"] for shard in listed(missing) for row in shard}


def raw(texts):
    return pa.array(
        [text if text is None else text.encode("utf-8", "surrogateescape") for text in texts], pa.binary()
    ).view(pa.string())


def test_urls_and_captions_need_not_be_utf8(tmp_path):
    """Their bytes are quoted; an odd row is a row, and the report can be written and read."""
    folder = select(tmp_path / "selection", list("abcd"))
    rows = pq.read_table(folder / "part-00000.parquet")
    urls = ["http://a/caf\udce9", "=http://a/\x1b[31m\n\udcff", None, "http://a/d"]
    captions = ["caf\udce9", None, "c", "d"]
    rows = rows.set_column(rows.schema.get_field_index("url"), "url", raw(urls)).append_column("caption", raw(captions))
    pq.write_table(rows, folder / "part-00000.parquet")
    store = Store(tmp_path / "store")
    missing = list_missing(folder, store, TERMS)
    assert missing[:2] == (4, 2)
    (asked,) = listed(missing)
    assert [(row["url"], row["source_url"], row["caption"]) for row in asked] == [
        ("http://a/caf%E9", "http://a/caf%E9", "caf%E9"),
        ("http://a/d", "http://a/d", "d"),
    ]
    key = asked[0]["key"]
    failure = record(key, FAILED, url="http://a/caf%E9", error="other", message="+cmd \x1b[2K\nx\u2028")
    store.add("00001-plain-00000", [failure, record(asked[1]["key"], url="http://a/d")])
    (store.tars / "a.tar").write_bytes(b"x")
    report = write_pool(folder, store, tmp_path / "pool", verify=True)
    assert (report.rows, report.successes, report.causes) == (4, 1, {"other": 1, "scheme refused": 2})
    report.save_errors(tmp_path / "errors.csv")
    text = (tmp_path / "errors.csv").read_text(encoding="utf-8")
    assert not set(text) & set("\x1b\u2028")
    with (tmp_path / "errors.csv").open(newline="") as file:
        read = {row["cause"]: row for row in csv.DictReader(file)}
    assert read["other"]["message"].startswith("'+cmd")
    assert read["scheme refused"]["example"].startswith("'=http")


@pytest.mark.parametrize("name", ["key", "order"])
def test_rows_without_a_key_or_an_order_are_refused(tmp_path, name):
    folder = select(tmp_path / "selection", list("abcd"))
    rows = pq.read_table(folder / "part-00000.parquet")
    values = [*rows[name].to_pylist()[:3], None]
    changed = pa.array(values, rows.schema.field(name).type)
    pq.write_table(rows.set_column(rows.schema.get_field_index(name), name, changed), folder / "part-00000.parquet")
    with pytest.raises(ArtefactError, match="no key or no order"):
        list_missing(folder, Store(tmp_path / "store"), TERMS)


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path / "store")


def test_attempts_count_and_the_last_one_tells(store):
    store.add("00001-plain-00000", [record("a", FAILED), record("b", FAILED), record("c")])
    store.add("00002-plain-00000", [record("a", attempt=2), record("b", FAILED, attempt=2, error="time out")])
    found = store.lookup(table("abcd"), verify=False).to_pylist()
    by_key = dict(zip(table("abcd")["key"].to_pylist(), found, strict=True))
    assert [by_key[key]["status"] for key in "abcd"] == [SUCCESS, FAILED, SUCCESS, None]
    assert [by_key[key]["attempt"] for key in "abcd"] == [2, 2, 1, None]
    assert by_key["b"]["error"] == "time out"


@pytest.mark.parametrize(("retry_failed", "again"), [(0, {}), (1, {}), (2, {"b": 3}), (3, {"b": 3})])
def test_failed_rows_are_tried_again_as_often_as_asked(tmp_path, store, retry_failed, again):
    store.add("00001-plain-00000", [record("a"), record("b", FAILED, attempt=2)])
    missing = list_missing(select(tmp_path / "s", "ab"), store, TERMS._replace(retry_failed=retry_failed))
    assert missing[:2] == (2, len(again))
    assert attempts(missing) == again


def test_a_picture_of_another_sha256_is_not_valid_when_that_is_verified(tmp_path, store):
    store.add("00001-plain-00000", [record("a"), record("b"), record("c")])
    store.add("00001-hashed-00000", [record("d", FAILED, error=SHA256_DIFFERS, expected="dd")])
    asked = table("abcd")
    expected = {"a": "CC", "b": "dd", "c": None, "d": "dd"}
    asked = asked.set_column(2, "sha256", pa.array([expected[key] for key in asked["key"].to_pylist()], pa.string()))

    def status(verify):
        found = store.lookup(asked, verify=verify)["status"].to_pylist()
        return dict(zip(asked["key"].to_pylist(), found, strict=True))

    assert status(True) == {"a": SUCCESS, "b": None, "c": SUCCESS, "d": FAILED}
    assert status(False) == {"a": SUCCESS, "b": SUCCESS, "c": SUCCESS, "d": None}
    selection = tmp_path / "selection"
    selection.mkdir()
    pq.write_table(asked, selection / "part-00000.parquet")
    ((row,),) = listed(list_missing(selection, store, TERMS))
    assert (row["key"], row["attempt"], row["sha256"]) == ("b", 2, "dd")


def test_another_url_of_the_same_key_is_another_row(store):
    store.add("00001-plain-00000", [record("a")])
    assert store.lookup(table("a", url=["http://b/a"]), verify=False)["status"].to_pylist() == [None]


def test_rows_that_are_recorded_twice_are_told(store):
    for name in ("00001-plain-00000", "00002-plain-00000"):
        store.add(name, [record("a")])
    with pytest.raises(ArtefactError, match="recorded twice"):
        store.lookup(table("a"), verify=False)


@pytest.mark.parametrize(("rows", "sizes"), [(21, [4] * 5 + [1]), (16, [4] * 4), (3, [3]), (0, [])])
def test_missing_rows_make_shards_in_their_order(tmp_path, store, monkeypatch, rows, sizes):
    """Whatever numbers of them are read at once; those that are known leave no gaps."""
    monkeypatch.setattr("vtp.curation.download.store.BATCH", 3)
    keys = [f"k{n}" for n in range(rows)]
    store.add("00007-00000", [record("known"), record("unknown", FAILED)])
    missing = list_missing(select(tmp_path / "selection", [*keys, "known", "unknown"]), store, TERMS)
    assert missing[:2] == (rows + 2, rows)
    assert [len(shard) for shard in listed(missing)] == sizes
    asked = [row["key"] for shard in listed(missing) for row in shard]
    assert asked == (table(keys)["key"].to_pylist() if keys else [])
    assert [path.name for path in missing.shards] == [f"00008-{n:05d}.parquet" for n in range(len(sizes))]


def test_a_kill_while_a_shard_is_taken_over_loses_and_doubles_nothing(tmp_path, store):
    """Its tar is in place and its rows are not, so it is no shard; what else was on its way is none either."""
    selection = select(tmp_path / "selection", ["a", "b", "c"])
    for name, keys in (("1-0", "a"), ("1-1", "b")):
        (store.incoming / name).mkdir(parents=True)
        (store.incoming / name / "0.tar").write_bytes(name.encode())
        store.adopt(name, store.incoming / name / "0.tar", [record(key, tar=f"tars/{name}.tar") for key in keys])
    (store.folder / "rows" / "1-1.parquet").rename(store.folder / "rows" / ".1-1.parquet.tmp")
    again = Store(store.folder)
    again.sweep()
    assert again.next_delivery() == "00002"
    assert sorted(path.relative_to(store.folder).as_posix() for path in store.folder.rglob("*.*")) == [
        "rows/1-0.parquet",
        "tars/1-0.tar",
    ]
    assert (again.tars / "1-0.tar").read_bytes() == b"1-0"
    assert attempts(list_missing(selection, again, TERMS)) == {"b": 1, "c": 1}


def test_only_http_is_fetched():
    urls = ["http://a/b", "HTTPS://a/b", " http://a/b", "ftp://a/b", "file:///a", "httpx://a", "", "data:,x"]
    assert fetchable(table("abcdefgh", url=urls)).tolist() == [True] * 3 + [False] * 5
