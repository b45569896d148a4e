"""The store's head, manifest and level choice."""

from __future__ import annotations

import hashlib
import json
import math
import re
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from preprocessing import manifest
from preprocessing.errors import StoreError
from preprocessing.manifest import open_store, pick_level, write_head, write_manifest, write_rejected
from preprocessing.settings import ConvertSettings

LEVELS = ("full", "512")


def store(root: Path, rows: int = 3) -> Path:
    write_head(root, ConvertSettings(levels=LEVELS))
    write_manifest(root, ({"image_id": str(n), "cancer": n % 2} for n in range(rows)), LEVELS, {"BIRADS": pa.float64()})
    write_rejected(root, [])
    return root


def test_the_manifest_has_the_schema_whatever_the_rows_hold(tmp_path: Path) -> None:
    store(tmp_path)
    written = pq.read_schema(tmp_path / "manifest.parquet")
    expected = manifest.schema(LEVELS, {"BIRADS": pa.float64()})
    assert written.names == expected.names
    assert [field.type for field in written] == [field.type for field in expected]
    assert open_store(tmp_path).manifest["BIRADS"].isna().all()


def test_rows_are_written_in_row_groups_as_they_come(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(manifest, "_ROWS_AT_ONCE", 10)
    store(tmp_path, 35)
    assert pq.ParquetFile(tmp_path / "manifest.parquet").num_row_groups == 4
    assert list(open_store(tmp_path).manifest["image_id"]) == [str(n) for n in range(35)]


def test_an_error_among_the_rows_keeps_the_old_manifest(tmp_path: Path) -> None:
    store(tmp_path)
    before = (tmp_path / "manifest.parquet").read_bytes()

    def rows():
        yield {"image_id": "new"}
        raise KeyError("row")

    with pytest.raises(KeyError):
        write_manifest(tmp_path, rows(), LEVELS, {})
    assert (tmp_path / "manifest.parquet").read_bytes() == before
    assert not list(tmp_path.glob("*.tmp")) + list(tmp_path.glob(".*.tmp"))


def test_an_empty_store_has_its_columns(tmp_path: Path) -> None:
    store(tmp_path, 0)
    opened = open_store(tmp_path)
    assert len(opened.manifest) == 0
    assert "path_512" in opened.manifest.columns


def test_rejected_rows_come_back_whatever_their_ids_hold(tmp_path: Path) -> None:
    store(tmp_path)
    row = dict.fromkeys(manifest.REJECTED_COLUMNS, "") | {"image_id": 'a,"b"\nc', "reason": "absent", "detail": "NA"}
    write_rejected(tmp_path, [row])
    assert open_store(tmp_path).rejected.to_dict("records") == [row]


def test_the_fingerprint_follows_what_training_sees(tmp_path: Path) -> None:
    rows = [{"image_id": "1", "cancer": 1, "crc32_full": 5, "crc32_512": 6, "site_id": "a"}]
    prints = []
    seen = ({"cancer": 0}, {"crc32_512": 7}, {"image_id": "2"}, {"laterality": "R"}, {"patient_id": "p"})
    for change in ({}, {"site_id": "b"}, *seen):
        write_head(tmp_path, ConvertSettings(levels=LEVELS))
        write_manifest(tmp_path, [rows[0] | change], LEVELS, {})
        prints.append(open_store(tmp_path).fingerprint)
    assert prints[0] == prints[1]
    assert len(set(prints)) == 1 + len(seen)


def test_a_store_is_known_by_the_fingerprint_that_runs_recorded_before(tmp_path: Path) -> None:
    write_head(tmp_path, ConvertSettings(levels=LEVELS))
    write_manifest(tmp_path, [{"image_id": "1", "cancer": 1, "crc32_full": 5, "crc32_512": 6}], LEVELS, {})
    opened = open_store(tmp_path)
    earlier = hashlib.sha256(b"image_id,cancer,crc32_full,crc32_512\n1,1.0,5,6\n").hexdigest()
    assert opened.is_known_as(earlier)
    assert opened.is_known_as(opened.fingerprint)
    assert opened.fingerprint != earlier
    assert not opened.is_known_as("0")


def test_a_list_of_rejected_inputs_that_is_gone_says_what_makes_it_anew(tmp_path: Path) -> None:
    store(tmp_path)
    (tmp_path / "rejected.csv").unlink(missing_ok=True)
    with pytest.raises(StoreError, match=r"rejected\.csv: not there\. Run the same convert again"):
        _ = open_store(tmp_path).rejected


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda root: (root / "store.json").unlink(), "no store there"),
        (lambda root: (root / "store.json").write_text("[]"), "not readable as a store's head"),
        (lambda root: (root / "store.json").write_text(json.dumps({"version": 99})), "store of version 99"),
        (lambda root: (root / "store.json").write_text('{"version": 1}'), "not readable as a store's head"),
        (lambda root: (root / "manifest.parquet").unlink(), "has not finished"),
    ],
)
def test_a_store_that_cannot_be_opened_is_one_clear_line(tmp_path: Path, break_it, message: str) -> None:
    break_it(store(tmp_path))
    with pytest.raises(StoreError, match=message):
        open_store(tmp_path)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda table: table.drop_columns(["patient_id"]), "damaged (no column patient_id)"),
        (lambda table: table.drop_columns(["crc32_512"]), "damaged (no column crc32_512)"),
        (lambda table: table.set_column(0, "image_id", [pa.nulls(len(table), pa.string())]), "(image_id is missing in"),
        (lambda table: text_in(table, "percentile_low"), "manifest.parquet: damaged. Run"),
    ],
)
def test_a_manifest_that_lacks_something_is_one_clear_line(tmp_path: Path, change, said: str) -> None:
    store(tmp_path)
    path = tmp_path / "manifest.parquet"
    pq.write_table(change(pq.read_table(path)), path)
    with pytest.raises(StoreError, match=re.escape(said)):
        _ = open_store(tmp_path).manifest


def text_in(table: pa.Table, name: str) -> pa.Table:
    return table.set_column(table.schema.get_field_index(name), name, [pa.array(["many"] * len(table))])


def test_a_manifest_that_pandas_has_written_anew_reads_back_the_same(tmp_path: Path) -> None:
    opened = open_store(store(tmp_path))
    before, path = (
        opened.manifest.assign(machine_id=["49", "", "49"], age=[50.0, None, 60.0]),
        tmp_path / "manifest.parquet",
    )
    before = before.astype({"age": "float32"})
    for changed in (
        before.astype({"cancer": "float64", "percentile_low": "float64"}),
        before.convert_dtypes(),
        before.assign(machine_id=["49", None, "49"]),
        before.set_index("image_id"),
        before.set_index(pd.Index([3, 4, 9])),
    ):
        changed.to_parquet(path)
        found = open_store(tmp_path)
        pd.testing.assert_frame_equal(found.manifest[list(before)], before)
        assert found.fingerprint == opened.fingerprint


def test_a_manifest_that_may_not_be_read_is_no_damaged_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path, **how: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(manifest.pq, "read_table", refuse)
    with pytest.raises(PermissionError, match=r"Permission denied: .*manifest\.parquet"):
        _ = open_store(store(tmp_path)).manifest


def test_no_bit_of_a_manifests_values_changes_unseen(tmp_path: Path) -> None:
    path, expected = tmp_path / "manifest.parquet", open_store(store(tmp_path)).manifest
    sound = path.read_bytes()
    values = range(4, pq.read_metadata(path).row_group(0).total_byte_size // 2)
    for at in values[:: max(1, len(values) // 40)]:
        path.write_bytes(sound[:at] + bytes([sound[at] ^ 1]) + sound[at + 1 :])
        try:
            found = open_store(tmp_path).manifest
        except StoreError:
            continue
        pd.testing.assert_frame_equal(found, expected)


@pytest.mark.parametrize(
    "content", [b"", b"image_id\n1,2\n", b'image_id,reason,detail\n"1,2', b"\xff\xfe\x00", b"a,b\n"]
)
def test_a_damaged_list_of_rejections_is_one_clear_line(tmp_path: Path, content: bytes) -> None:
    store(tmp_path)
    (tmp_path / "rejected.csv").write_bytes(content)
    with pytest.raises(StoreError, match=r"rejected\.csv: damaged\. Run the same convert again"):
        _ = open_store(tmp_path).rejected


@pytest.mark.parametrize(
    ("height", "width", "target", "level"),
    [
        (3328, 2560, (512, 512), "512"),
        (3328, 2560, (513, 513), "1024"),
        (3328, 1000, (512, 512), "512"),
        (3328, 2560, (2048, 1024), "2048"),
        (3000, 1500, (2048, 1024), "2048"),
        (3328, 2560, (4096, 4096), "full"),
        (600, 400, (512, 512), "512"),
        (400, 300, (512, 512), "512"),
    ],
)
def test_the_smallest_level_that_need_not_be_enlarged_is_read(
    height: int, width: int, target: tuple[int, int], level: str
) -> None:
    levels = ("full", "2048", "1024", "512")
    assert pick_level(levels, height, width, *target) == level


def test_without_a_level_large_enough_the_largest_is_read() -> None:
    assert pick_level(("1024", "512"), 3000, 2000, 2048, 2048) == "1024"


def test_nan_and_none_become_missing_labels(tmp_path: Path) -> None:
    rows = [{"image_id": "1", "cancer": None}, {"image_id": "2", "cancer": math.nan}, {"image_id": "3", "cancer": 1.0}]
    write_head(tmp_path, ConvertSettings(levels=LEVELS))
    write_manifest(tmp_path, rows, LEVELS, {})
    read = open_store(tmp_path).manifest["cancer"]
    assert list(pd.isna(read)) == [True, True, False]


def test_a_damaged_manifest_is_one_clear_line(tmp_path: Path) -> None:
    path = store(tmp_path) / "manifest.parquet"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(StoreError, match=r"manifest\.parquet: damaged\. Run the same convert again"):
        _ = open_store(tmp_path).manifest
