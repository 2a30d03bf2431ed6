"""The store, the lists for img2dataset, and what is taken over of its work."""

import csv
import io
import json
import tarfile

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from vtp.artefact import ArtefactError
from vtp.curation.download.deliveries import Terms, adopt, cause_of, list_missing, plain_url, recover
from vtp.curation.download.pool import write_pool
from vtp.curation.download.store import FAILED, SHA256_DIFFERS, SUCCESS, DownloadRecord, Store, fetchable
from vtp.curation.rows import order_of

TERMS = Terms(verify_sha256=True, retry_failed=0, rows_per_shard=4, extension="jpg")


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


def listed(delivery):
    """Keys and attempts in the lists of a delivery, by kind."""
    rows = {
        kind.name: pa.concat_tables(map(pq.read_table, sorted(kind.glob("lists/*")))) for kind in delivery.iterdir()
    }
    return {
        kind: dict(zip(rows[kind]["key"].to_pylist(), rows[kind]["attempt"].to_pylist(), strict=True)) for kind in rows
    }


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
    assert list_missing(folder, store, tmp_path / "delivery", TERMS) == (4, 2)
    asked = pq.read_table(next((tmp_path / "delivery" / "plain" / "lists").iterdir())).to_pylist()
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
        list_missing(folder, Store(tmp_path / "store"), tmp_path / "delivery", TERMS)


def deliver(folder, shard, failed=(), lost=(), text="ü"):
    """What img2dataset leaves of a finished shard."""
    asked = pq.read_table(next(folder.glob("lists/*"))).slice(shard * 4, 4).to_pylist()
    rows = []
    (folder / "shards").mkdir(exist_ok=True)
    with tarfile.open(folder / "shards" / f"{shard:05d}.tar", "w") as tar:
        for row in asked:
            good = row["key"] not in failed
            told = {
                "row": row["row"],
                "key": f"{row['row']:09d}",
                "status": "success" if good else "failed_to_download",
            }
            told |= {"error_message": None if good else failed[row["key"]], "sha256": "cc", "width": 4, "height": 3}
            rows += [] if row["key"] in lost else [told | {"original_width": 8, "original_height": 6}]
            if good:
                for suffix, content in ((".jpg", row["key"].encode()), (".txt", text.encode())):
                    info = tarfile.TarInfo(told["key"] + suffix)
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))
    pq.write_table(pa.Table.from_pylist(rows), folder / "shards" / f"{shard:05d}.parquet")
    (folder / "shards" / f"{shard:05d}_stats.json").write_text(json.dumps({"count": len(asked)}))


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path / "store")


def test_missing_rows_are_listed_and_finished_shards_adopted(tmp_path, store):
    keys = [f"k{n}" for n in range(10)]
    selection = select(tmp_path / "selection", keys)
    delivery = store.folder / "incoming" / store.next_delivery()
    assert list_missing(selection, store, delivery, TERMS) == (10, 10)
    assert listed(delivery) == {"plain": dict.fromkeys(keys, 1)}
    order = table(keys)["key"].to_pylist()
    failed = {order[1]: "HTTP Error 404: Not Found", order[2]: "<urlopen error [Errno 111] Connection refused>"}
    deliver(delivery / "plain", 0, failed, lost=[order[3]])
    deliver(delivery / "plain", 2)
    assert [adopted.rows for adopted in adopt(delivery, store)] == [3, 2]
    # Of the second shard nothing came, and for one row of the first nobody was asked.
    second = store.folder / "incoming" / store.next_delivery()
    assert list_missing(selection, store, second, TERMS) == (10, 5)
    assert listed(second) == {"plain": dict.fromkeys([order[2], *order[4:8]], 1)}
    # Another process finds the same.
    assert Store(store.folder).lookup(table(keys), verify=True).equals(store.lookup(table(keys), verify=True))
    report = write_pool(selection, store, tmp_path / "pool", verify=True)
    assert report.causes["http 404"] == 1
    assert report.causes["other"] == 1
    rows = pq.read_table(tmp_path / "pool" / "part-00000.parquet").to_pylist()
    for row in rows:
        if row["status"] == SUCCESS:
            assert (row["width"], row["height"], row["stored_width"], row["stored_height"]) == (8, 6, 4, 3)
            with (tmp_path / "pool" / row["tar"]).open("rb") as file:
                file.seek(row["offset"])
                assert file.read(row["size"]) == row["key"].encode()


@pytest.mark.parametrize("damage", ["tar", "cut", "table", "statistics", "count"])
def test_a_shard_that_is_not_whole_is_missing(tmp_path, store, damage):
    selection = select(tmp_path / "selection", ["a", "b", "c"])
    delivery = store.folder / "incoming" / "00001"
    list_missing(selection, store, delivery, TERMS)
    deliver(delivery / "plain", 0)
    shards = delivery / "plain" / "shards"
    if damage == "tar":
        (shards / "00000.tar").unlink()
    elif damage == "cut":
        content = (shards / "00000.tar").read_bytes()
        (shards / "00000.tar").write_bytes(content[:2100])
    elif damage == "table":
        content = (shards / "00000.parquet").read_bytes()
        (shards / "00000.parquet").write_bytes(content[:-100])
    elif damage == "statistics":
        (shards / "00000_stats.json").write_text('{"count": ')
    else:
        (shards / "00000_stats.json").write_text('{"count": 2}')
    assert not list(adopt(delivery, store))
    assert recover(store.folder / "incoming", store) == 0
    assert list_missing(selection, store, delivery, TERMS) == (3, 3)


@pytest.mark.parametrize("after", ["tar", "rows"])
def test_a_kill_while_a_shard_is_moved_loses_and_doubles_nothing(tmp_path, store, after):
    selection = select(tmp_path / "selection", ["a", "b", "c"])
    delivery = store.folder / "incoming" / "00001"
    list_missing(selection, store, delivery, TERMS)
    deliver(delivery / "plain", 0)
    kept = [(path, path.read_bytes()) for path in (delivery / "plain" / "shards").iterdir()]
    assert len(list(adopt(delivery, store))) == 1
    for path, content in kept:
        if path.suffix != ".tar":
            path.write_bytes(content)
    if after == "tar":
        (store.folder / "rows" / "00001-plain-00000.parquet").unlink()
    again = Store(store.folder)
    assert recover(store.folder / "incoming", again) == (3 if after == "tar" else 0)
    assert not list((store.folder / "incoming").iterdir())
    assert again.next_delivery() == "00002"
    assert set(again.lookup(table("abc"), verify=True)["status"].to_pylist()) == {SUCCESS}
    assert list_missing(selection, again, delivery, TERMS) == (3, 0)


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
    delivery = tmp_path / "delivery"
    list_missing(select(tmp_path / "s", "ab"), store, delivery, TERMS._replace(retry_failed=retry_failed))
    assert (listed(delivery) if delivery.exists() else {}) == ({"plain": again} if again else {})


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
    list_missing(selection, store, tmp_path / "delivery", TERMS)
    assert listed(tmp_path / "delivery") == {"hashed": {"b": 2}}


def test_another_url_of_the_same_key_is_another_row(store):
    store.add("00001-plain-00000", [record("a")])
    assert store.lookup(table("a", url=["http://b/a"]), verify=False)["status"].to_pylist() == [None]


def test_rows_that_are_recorded_twice_are_told(store):
    for name in ("00001-plain-00000", "00002-plain-00000"):
        store.add(name, [record("a")])
    with pytest.raises(ArtefactError, match="recorded twice"):
        store.lookup(table("a"), verify=False)


@pytest.mark.parametrize(("rows", "sizes"), [(21, [8, 8, 5]), (16, [8, 8]), (3, [3])])
def test_lists_are_split_at_shards(tmp_path, store, monkeypatch, rows, sizes):
    monkeypatch.setattr("vtp.curation.download.deliveries.LIST_ROWS", 9)  # two shards of 4 a list
    monkeypatch.setattr("vtp.curation.download.store.BATCH", 3)
    selection = select(tmp_path / "selection", [f"k{n}" for n in range(rows)])
    assert list_missing(selection, store, tmp_path / "delivery", TERMS) == (rows, rows)
    lists = [pq.read_table(path) for path in sorted((tmp_path / "delivery" / "plain" / "lists").iterdir())]
    assert [len(each) for each in lists] == sizes
    assert pa.concat_tables(lists)["row"].to_pylist() == list(range(rows))


def test_only_http_is_fetched():
    urls = ["http://a/b", "HTTPS://a/b", " http://a/b", "ftp://a/b", "file:///a", "httpx://a", "", "data:,x"]
    assert fetchable(table("abcdefgh", url=urls)).tolist() == [True] * 3 + [False] * 5


@pytest.mark.parametrize(
    ("url", "plain"),
    [
        ("http://a/b?c=%20d#e", "http://a/b?c=%20d#e"),
        ("http://a/straße ü", "http://a/stra%C3%9Fe%20%C3%BC"),
        ("http://müller.de/ü", "http://xn--mller-kva.de/%C3%BC"),
        ("http://ü:ä@пример.рф:8080/", "http://%C3%BC:%C3%A4@xn--e1afmkfd.xn--p1ai:8080/"),
        (" http://a/b\n", "http://a/b"),
        ("http://a/b\r\nHost: c", "http://a/b%0D%0AHost:%20c"),
    ],
)
def test_urls_become_ascii(url, plain):
    assert plain_url(url) == plain


@pytest.mark.parametrize(
    ("message", "cause"),
    [
        ("HTTP Error 403: proxy: address refused", "address refused"),
        ("HTTP Error 403: Forbidden", "http 403"),
        ("HTTP Error 301: Moved - Redirection to url 'file:///a' is not allowed", "scheme refused"),
        (
            "HTTP Error 302: ... would lead to an infinite loop.\nThe last 30x error message was:\nFound",
            "redirect loop",
        ),
        ("hash mismatch", SHA256_DIFFERS),
        ("too many pixels: 9 x 9", "too many pixels"),
        ("<urlopen error [Errno 111] Connection refused>", None),
        ("Remote end closed connection without response", None),
        ("<urlopen error URL too long>", "bad url"),
        ("something new", "other"),
    ],
)
def test_messages_have_causes(message, cause):
    assert cause_of(message) == cause
