"""Spills give back what was written."""

import numpy as np
import pyarrow as pa

from vtp.curation.filter.spill import (
    BATCH,
    part_of,
    pick_rows,
    read_record_spill,
    read_spilled_rows,
    read_table_spill,
    span_of,
    write_record_spill,
    write_rows,
    write_table_spill,
)


def test_parts_are_in_the_order_of_hashes():
    hashes = np.sort(np.random.default_rng(0).integers(0, 2**64, 5000, dtype=np.uint64))
    edges = np.array([0, 2**64 - 1], np.uint64)
    parts = part_of(np.concatenate([edges[:1], hashes, edges[1:]]), 7)
    assert (np.diff(parts.astype(int)) >= 0).all()
    assert (parts[0], parts[-1]) == (0, 6)
    assert np.bincount(parts.astype(int)).min() > 600
    assert span_of(10) == span_of(10_000_000) < span_of(1_000_000_000) < 2 << 20


def test_tables(tmp_path):
    table = pa.table({"a": range(50), "b": [f"text {i}" for i in range(50)]})
    paths = [tmp_path / "0.arrow", tmp_path / "1.arrow"]
    write_table_spill(paths[0], table, np.repeat([0, 3], 25), 5)
    write_table_spill(paths[1], table.slice(0, 10), np.full(10, 3), 5)
    assert read_table_spill(paths, 0)["a"].to_pylist() == list(range(25))
    assert read_table_spill(paths, 3)["a"].to_pylist() == [*range(25, 50), *range(10)]
    assert read_table_spill(paths, 1).num_rows == read_table_spill(paths, 4).num_rows == 0


def test_rows_by_column_and_by_place(tmp_path):
    count = 2 * BATCH + 100
    write_rows(tmp_path / "rows.arrow", pa.table({"a": range(count), "b": map(str, range(count)), "c": range(count)}))
    assert read_spilled_rows(tmp_path / "rows.arrow", ["c", "a"]).column_names == ["c", "a"]
    places = np.array([0, 5, BATCH - 1, 2 * BATCH, count - 1])
    picked = pick_rows(tmp_path / "rows.arrow", ["b", "a"], places)
    assert picked.column_names == ["b", "a"]
    assert picked["a"].to_pylist() == places.tolist()
    assert pick_rows(tmp_path / "rows.arrow", ["b"], np.array([], int)).num_rows == 0


def test_records(tmp_path):
    draws = np.random.default_rng(0)
    written = []
    for number in range(3):
        records, part = draws.integers(0, 99, (40, 2)).astype(np.uint64), draws.integers(0, 4, 40)
        write_record_spill(tmp_path / f"{number}.npy", records, part, 5)
        written.append((records, part))
    paths = [tmp_path / f"{number}.npy" for number in range(3)]
    for part in range(5):
        expected = np.concatenate([records[parts == part] for records, parts in written])
        assert np.array_equal(read_record_spill(paths, part, 5, 2), expected)
