"""The run as a whole: what comes out, what is rejected and named, what a second run does."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from preprocessing import tiles
from preprocessing import workers as workers_module
from preprocessing.convert import convert
from preprocessing.errors import InputError, StoreError, UserError
from preprocessing.journal import locked
from preprocessing.manifest import STORE_VERSION, Store, open_store
from preprocessing.progress import Progress
from preprocessing.settings import ConvertSettings
from preprocessing.table import one_row_a_picture
from preprocessing.verify import verify
from tests.preprocessing.pictures import HEADER, data_set, digest, picture, write_png

SETTINGS = ConvertSettings(levels=("full", "128", "64"), timeout_s=20)


def reasons(store: Path) -> dict[str, str]:
    rejected = open_store(store).rejected
    return dict(zip(rejected["image_id"], rejected["reason"], strict=True))


def tile_times(store: Path) -> dict[str, int]:
    return {path.name + path.parts[-3]: path.stat().st_mtime_ns for path in (store / "tiles").rglob("*.tif")}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return data_set(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def made(data: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("made") / "store"
    convert(*data, out, SETTINGS, workers=2)
    return out


def test_the_manifest_holds_every_picture_in_order_with_the_csvs_cells(data: tuple[Path, Path], made: Path) -> None:
    manifest = open_store(made).manifest
    table = pd.read_csv(data[1], dtype={"patient_id": str, "image_id": str})
    expected = table.sort_values(["patient_id", "image_id"], ignore_index=True)
    for column in ("patient_id", "image_id", "laterality", "view", "density"):
        assert list(manifest[column]) == list(expected[column])
    for column in ("age", "cancer", "biopsy", "BIRADS", "implant"):
        assert list(manifest[column]) == list(expected[column])
    assert list(manifest["prediction_id"]) == list(expected["patient_id"] + "_" + expected["laterality"])
    assert manifest.columns[0] == "image_id"
    assert manifest.index.equals(pd.RangeIndex(12))


def test_the_full_level_is_the_crop_of_the_source_pixel_for_pixel(made: Path) -> None:
    store = open_store(made)
    for row in store.manifest.to_dict("records"):
        source = picture(int(row["image_id"]) - 1000)
        crop = source[
            row["crop_top"] : row["crop_top"] + row["crop_height"],
            row["crop_left"] : row["crop_left"] + row["crop_width"],
        ]
        level = tiles.read_level(made / row["path_full"])
        assert np.array_equal(level, crop)
        assert source[source >= 900].size == level[level >= 900].size, "the crop cuts the breast"
        assert level.shape == (row["height_full"], row["width_full"])
        assert tiles.read_level(made / row["path_64"]).shape == (row["height_64"], row["width_64"])


def test_one_process_and_two_make_the_same_store(data: tuple[Path, Path], made: Path, tmp_path: Path) -> None:
    convert(*data, tmp_path / "store", SETTINGS, workers=1)
    assert digest(tmp_path / "store") == digest(made)


def test_progress_counts_every_file(data: tuple[Path, Path], tmp_path: Path) -> None:
    seen: list[Progress] = []
    convert(*data, tmp_path / "store", SETTINGS, workers=2, progress=seen.append)
    assert [state.done for state in seen] == list(range(1, 13))
    assert {state.total for state in seen} == {12}
    assert seen[-1].bytes == sum(path.stat().st_size for path in data[0].rglob("*.png"))


def test_an_outcome_that_takes_an_earlier_ones_place_counts_in_its_place(
    data: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = workers_module.run_local

    def and_one_otherwise(*arguments: Any) -> Iterator[workers_module.Outcome]:
        *others, last = original(*arguments)
        yield from [
            *others,
            last,
            workers_module.Outcome(last.task, failure=workers_module.Failure("crash", "SIGSEGV"), again=True),
        ]

    monkeypatch.setattr(workers_module, "run_local", and_one_otherwise)
    seen: list[Progress] = []
    summary = convert(*data, tmp_path / "store", SETTINGS, workers=1, progress=seen.append)
    assert (summary.images, summary.converted, summary.rejected) == (11, 11, 1)
    assert summary.by_syntax == {"png": 11}
    assert summary.bytes == sum(path.stat().st_size for path in data[0].rglob("*.png"))
    assert (seen[-1].done, seen[-1].rejected) == (12, 1)


def test_a_second_run_does_nothing_again(data: tuple[Path, Path], tmp_path: Path) -> None:
    out = tmp_path / "store"
    convert(*data, out, SETTINGS)
    before, times = digest(out), tile_times(out)
    summary = convert(*data, out, SETTINGS)
    assert (summary.converted, summary.unchanged) == (0, 12)
    assert digest(out) == before
    assert tile_times(out) == times


def test_only_what_is_missing_or_changed_is_done_again(tmp_path: Path) -> None:
    images, csv = data_set(tmp_path, 8)
    out = tmp_path / "store"
    convert(images, csv, out, SETTINGS)
    write_png(images / "500" / "1001.png", 77)  # another picture
    (out / "tiles" / "full" / "500" / "1002.tif").unlink()
    (out / "tiles" / "64" / "499" / "1004.tif").write_bytes(b"short")
    csv.write_text(csv.read_text().replace(",1003,R,MLO,53.0,1,", ",1003,R,MLO,53.0,0,"))  # another label
    summary = convert(images, csv, out, SETTINGS)
    assert (summary.converted, summary.unchanged) == (3, 5)
    convert(images, csv, tmp_path / "fresh", SETTINGS)
    assert digest(out) == digest(tmp_path / "fresh")
    assert open_store(out).manifest.set_index("image_id").loc["1003", "cancer"] == 0


def test_pictures_that_another_table_does_not_name_leave_the_manifest_and_come_back(tmp_path: Path) -> None:
    images, csv = data_set(tmp_path, 6)
    assert convert(images, csv, tmp_path / "store", SETTINGS).left_out == 0
    shorter = tmp_path / "shorter.csv"
    shorter.write_text("\n".join(csv.read_text().splitlines()[:4]) + "\n")
    second = convert(images, shorter, tmp_path / "store", SETTINGS)
    assert (second.images, second.left_out) == (3, 3)
    assert "3 that the store had are not in this table" in str(second)
    third = convert(images, csv, tmp_path / "store", SETTINGS)
    assert (third.images, third.converted, third.left_out) == (6, 0, 0)


def test_a_picture_marked_inverted_later_is_turned(tmp_path: Path) -> None:
    images, csv = data_set(tmp_path, 4)
    convert(images, csv, tmp_path / "store", SETTINGS)
    lines = csv.read_text().splitlines()
    csv.write_text("\n".join([lines[0] + ",inverted", lines[1] + ",1", *(line + ",0" for line in lines[2:])]))
    assert convert(images, csv, tmp_path / "store", SETTINGS).converted == 1
    row = open_store(tmp_path / "store").manifest.set_index("image_id").loc["1000"]
    assert row["inverted"]
    top = 2 ** int(row["bits_stored"]) - 1
    whole = tiles.read_level(tmp_path / "store" / row["path_full"])
    assert whole.max() == top - picture(0).min()


def test_hostile_inputs_are_rejected_each_with_its_reason(tmp_path: Path) -> None:
    images, csv = data_set(tmp_path, 4)
    folder = images / "hostile"
    folder.mkdir()
    (folder / "empty.dcm").write_bytes(b"")
    (folder / "text.dcm").write_text("this is no picture")
    (folder / "folder.dcm").mkdir()
    os.mkfifo(folder / "fifo.dcm")
    (folder / "loop.dcm").symlink_to(folder / "loop.dcm")
    (folder / "device.dcm").symlink_to("/dev/zero")
    good = (images / "500" / "1000.png").read_bytes()
    (folder / "cut.png").write_bytes(good[: len(good) // 2])
    names = ["empty", "text", "folder", "fifo", "loop", "device", "cut", "absent", "../../x", "a/b", "x" * 400]
    with csv.open("a", encoding="utf-8") as file:
        for name in names:
            file.write(f"1,hostile,{name},L,CC,50,0,0,0,B,29,\n")
    out = tmp_path / "store"
    summary = convert(images, csv, out, SETTINGS, workers=2)
    assert (summary.images, summary.rejected) == (4, len(names))
    found = reasons(out)
    assert set(found) == set(names)
    assert found["absent"] == found["../../x"] == found["a/b"] == found["x" * 400] == "absent"
    assert found["empty"] == "empty"
    assert {found[name] for name in ("folder", "fifo", "loop", "device")} == {"not_a_file"}
    assert found["text"] == "not_an_image"
    assert not {path.name for path in tmp_path.iterdir()} - {"train_images", "train.csv", "store"}


def test_ids_that_are_no_file_names_stay_inside_the_store(tmp_path: Path) -> None:
    images = tmp_path / "images"
    ids = ["../../x", "a/b", "..", ".hidden", "x" * 400, "ünï", "%2E", "a b"]
    lines = ["patient_id,image_id,file"]
    for number, name in enumerate(ids):
        write_png(images / f"{number}.png", number)
        lines.append(f"{name},{name},{number}.png")
    (tmp_path / "t.csv").write_text("\n".join(lines), encoding="utf-8")
    out = tmp_path / "deep" / "er" / "store"
    convert(images, tmp_path / "t.csv", out, SETTINGS)
    manifest = open_store(out).manifest
    assert sorted(manifest["image_id"]) == sorted(ids)
    assert manifest["path_full"].is_unique
    for path in manifest["path_full"]:
        resolved = (out / path).resolve()
        assert resolved.is_file()
        assert resolved.is_relative_to(out / "tiles")
    assert sorted(path.name for path in (tmp_path / "deep").iterdir()) == ["er"]


def test_a_folder_without_csv_is_walked_and_named(tmp_path: Path) -> None:
    images, _ = data_set(tmp_path, 8)
    convert(images, None, tmp_path / "store", SETTINGS)
    manifest = open_store(tmp_path / "store").manifest
    assert sorted(manifest["image_id"]) == [str(1000 + number) for number in range(8)]
    assert set(manifest["patient_id"]) == {"500", "499"}
    assert manifest["cancer"].isna().all()


def test_a_test_table_without_labels_keeps_its_prediction_ids(tmp_path: Path) -> None:
    images, csv = data_set(tmp_path, 4)
    table = pd.read_csv(csv, dtype=str)[["site_id", "patient_id", "image_id", "laterality", "view"]]
    table["prediction_id"] = [f"asked_{index}" for index in range(4)]
    table.to_csv(tmp_path / "test.csv", index=False)
    convert(images, tmp_path / "test.csv", tmp_path / "store", SETTINGS)
    manifest = open_store(tmp_path / "store").manifest
    assert sorted(manifest["prediction_id"]) == [f"asked_{index}" for index in range(4)]
    assert manifest["cancer"].isna().all()
    assert manifest["age"].isna().all()


def test_rejected_pictures_that_are_mended_come_in_with_the_next_run(tmp_path: Path) -> None:
    images, csv = data_set(tmp_path, 4)
    whole = (images / "500" / "1001.png").read_bytes()
    (images / "500" / "1001.png").write_bytes(whole[:40])
    (images / "500" / "1002.png").rename(tmp_path / "away.png")
    first = convert(images, csv, tmp_path / "store", SETTINGS)
    assert (first.images, first.rejected) == (2, 2)
    (images / "500" / "1001.png").write_bytes(whole)
    (tmp_path / "away.png").rename(images / "500" / "1002.png")
    second = convert(images, csv, tmp_path / "store", SETTINGS)
    assert (second.images, second.converted, second.rejected) == (4, 2, 0)


def _file(tmp_path: Path) -> Path:
    (tmp_path / "out").write_text("x")
    return tmp_path / "out"


def _no_store(tmp_path: Path) -> Path:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.docx").touch()
    return tmp_path / "out"


def _other_version(tmp_path: Path) -> Path:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "store.json").write_text(json.dumps({"version": STORE_VERSION + 1, "settings": {}}))
    return tmp_path / "out"


def _unreadable(tmp_path: Path) -> Path:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "store.json").write_text("{")
    return tmp_path / "out"


@pytest.mark.parametrize(
    ("prepare", "message"),
    [
        (_file, "a file, not a folder"),
        (_no_store, "not empty and no store \\(it holds thesis.docx"),
        (_other_version, f"store of version {STORE_VERSION + 1}"),
        (_unreadable, "not readable as a store's head"),
    ],
)
def test_an_output_that_cannot_be_used_is_one_clear_line(
    data: tuple[Path, Path], tmp_path: Path, prepare, message: str
) -> None:
    out = prepare(tmp_path)
    before = digest(tmp_path)
    with pytest.raises(StoreError, match=message) as caught:
        convert(*data, out, SETTINGS)
    assert "\n" not in str(caught.value)
    assert digest(tmp_path) == before, "what was there must stay as it was"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"codec": "none"}, "made with codec = zstd, now none is asked for"),
        ({"levels": ("64",)}, "made with levels = full,128,64, now 64 is asked for"),
        ({"crop": False}, "made with crop = True, now False"),
    ],
)
def test_other_settings_are_refused_with_the_difference(
    data: tuple[Path, Path], made: Path, change: dict[str, object], message: str
) -> None:
    with pytest.raises(StoreError, match=message):
        convert(*data, made, SETTINGS.model_copy(update=change))


def test_limits_may_differ_between_runs(data: tuple[Path, Path], made: Path) -> None:
    assert convert(*data, made, SETTINGS.model_copy(update={"timeout_s": 99.0})).unchanged == 12


def test_a_missing_folder_is_one_clear_line(data: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such folder of pictures"):
        convert(tmp_path / "absent", data[1], tmp_path / "store")
    assert not (tmp_path / "store").exists()


def test_bad_tables_leave_no_store_behind(data: tuple[Path, Path], tmp_path: Path) -> None:
    (tmp_path / "empty.csv").write_text(HEADER + "\n")
    with pytest.raises(UserError, match="no rows below its header"):
        convert(data[0], tmp_path / "empty.csv", tmp_path / "store")
    assert not (tmp_path / "store").exists()


def test_a_store_in_use_is_refused(data: tuple[Path, Path], made: Path) -> None:
    with locked(made), pytest.raises(StoreError, match="another run is converting into this store"):
        convert(*data, made, SETTINGS)


@pytest.mark.parametrize("change", ["empty folder", "absolute paths"])
def test_a_table_of_another_folder_leaves_a_store_as_it_is(tmp_path: Path, change: str) -> None:
    images, csv = data_set(tmp_path / "data", count=4)
    out, other = tmp_path / "store", tmp_path / "other"
    convert(images, csv, out, SETTINGS)
    before, journal = digest(out), (out / "journal.jsonl").read_bytes()
    other.mkdir()
    if change == "absolute paths":
        rows = pd.read_csv(csv, dtype=str)
        rows["file"] = "/elsewhere/" + rows["image_id"] + ".png"
        rows.to_csv(csv, index=False)
    with pytest.raises(InputError, match=r"none of the 4 pictures of .* is there .*--images"):
        convert(other, csv, out, SETTINGS)
    assert digest(out) == before
    assert (out / "journal.jsonl").read_bytes() == journal
    with pytest.raises(InputError, match="none of the 4 pictures"):
        convert(other, csv, tmp_path / "new", SETTINGS)
    assert not (tmp_path / "new").exists()


def test_repair_of_a_run_that_was_cut_short_compares_its_tiles_with_the_journal(tmp_path: Path) -> None:
    images, csv = data_set(tmp_path / "data", count=4)
    out = tmp_path / "store"
    convert(images, csv, out, SETTINGS)
    before = digest(out)
    (out / "manifest.parquet").unlink()
    tile = next((out / "tiles").rglob("*.tif"))
    data = bytearray(tile.read_bytes())
    data[len(data) // 2] ^= 1
    tile.write_bytes(data)
    summary = convert(images, csv, out, SETTINGS, repair=True)
    assert (summary.converted, summary.unchanged) == (1, 3)
    assert digest(out) == before


def test_verify_names_every_damaged_tile_and_repair_mends_just_those(tmp_path: Path) -> None:
    images, csv = data_set(tmp_path, 8)
    out = tmp_path / "store"
    convert(images, csv, out, SETTINGS)
    before, times = digest(out), tile_times(out)
    assert verify(open_store(out)) == []
    flipped = out / "tiles" / "64" / "500" / "1001.tif"
    content = bytearray(flipped.read_bytes())
    content[len(content) // 2] ^= 1
    flipped.write_bytes(bytes(content))
    (out / "tiles" / "full" / "499" / "1006.tif").unlink()
    found = {(problem.image_id, problem.path) for problem in verify(open_store(out))}
    assert found == {("1001", "tiles/64/500/1001.tif"), ("1006", "tiles/full/499/1006.tif")}
    summary = convert(images, csv, out, SETTINGS, repair=True)
    assert summary.converted == 2
    assert digest(out) == before
    redone = {name for name, time in tile_times(out).items() if times[name] != time}
    assert {name[:4] for name in redone} == {"1001", "1006"}


def test_verify_looks_at_every_picture_of_a_large_store(tmp_path: Path) -> None:
    """And says so of those whose sum is smaller as of those whose sum is larger."""
    (tmp_path / "tile").write_bytes(b"")  # its CRC-32 is 0
    store = Store(tmp_path, ConvertSettings(levels=("full",)))
    sums = np.arange(600) % 2 * 5
    columns = {"image_id": [str(number) for number in range(600)], "path_full": "tile", "crc32_full": sums}
    store.__dict__["manifest"] = pd.DataFrame(columns)  # the cached property
    assert [int(problem.image_id) for problem in verify(store)] == np.flatnonzero(sums).tolist()
    (tmp_path / "tile").write_bytes(b"x")
    assert len(verify(store)) == 600


@pytest.mark.real
def test_the_real_subset_converts_with_its_inverted_pictures_turned(real_data: Path, tmp_path: Path) -> None:
    table = pd.read_csv(real_data / "rsna_subset" / "train.csv", dtype=str)
    chosen = pd.concat([table[table["inverted"] == "1"].head(6), table[table["inverted"] == "0"].head(6)])
    chosen.to_csv(tmp_path / "t.csv", index=False)
    convert(real_data / "rsna_subset", tmp_path / "t.csv", tmp_path / "store")
    store = open_store(tmp_path / "store")
    assert len(store.manifest) == 12
    assert sorted(store.manifest["inverted"]) == [False] * 6 + [True] * 6
    for row in store.manifest.to_dict("records"):
        level = tiles.read_level(store.root / row["path_full"])
        assert np.median(level[[0, -1]]) < 60, "the background must be dark"


@pytest.mark.parametrize(("no", "yes"), [("False", "True"), ("no", "yes"), ("0", "1")])
def test_there_is_cancer_where_one_row_of_a_picture_says_so_in_any_words(no: str, yes: str) -> None:
    table = pd.DataFrame({"image_id": ["a", "a", "b", "b"], "patient_id": "p", "cancer": [no, yes, no, ""]})
    assert [float(cell) for cell in one_row_a_picture(table)["cancer"]] == [1.0, 0.0]


def test_a_call_that_would_take_labels_or_pictures_from_a_store_is_refused(tmp_path: Path, caplog) -> None:
    images, csv = data_set(tmp_path, 3)
    listed = pd.read_csv(csv, dtype=str)
    listed.assign(format="FFDM").to_csv(csv, index=False)
    with caplog.at_level("INFO"):
        convert(images, csv, tmp_path / "store", SETTINGS, workers=1)
    assert "Not carried from the table, for the manifest has its own: format." in caplog.text
    before = digest(tmp_path / "store")
    with pytest.raises(InputError, match="its labels came with a table, and none is given"):
        convert(images, None, tmp_path / "store", SETTINGS, workers=1)
    listed.drop(columns="cancer").to_csv(tmp_path / "unlabelled.csv", index=False)
    with pytest.raises(InputError, match="the one given has no column cancer"):
        convert(images, tmp_path / "unlabelled.csv", tmp_path / "store", SETTINGS, workers=1)
    listed.iloc[1:].to_csv(tmp_path / "fewer.csv", index=False)
    with pytest.raises(InputError, match="--repair, but 1 of its 3 pictures"):
        convert(images, tmp_path / "fewer.csv", tmp_path / "store", SETTINGS, workers=1, repair=True)
    assert digest(tmp_path / "store") == before
    assert convert(images, tmp_path / "fewer.csv", tmp_path / "store", SETTINGS, workers=1).images == 2


def test_a_manifest_serves_as_the_table_of_another_store(tmp_path: Path) -> None:
    images, csv = data_set(tmp_path, 3)
    convert(images, csv, tmp_path / "store", SETTINGS, workers=1)
    manifest = open_store(tmp_path / "store").manifest
    manifest.assign(file=manifest["source_path"]).to_csv(tmp_path / "again.csv", index=False)
    convert(images, tmp_path / "again.csv", tmp_path / "again", SETTINGS, workers=1)
    assert len(open_store(tmp_path / "again").manifest) == 3


def test_a_first_try_that_was_watched_and_failed_does_not_close_its_folder(tmp_path: Path) -> None:
    images, csv = data_set(tmp_path, 3)
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / "metrics.jsonl").write_text("{}\n")
    assert convert(images, csv, tmp_path / "store", SETTINGS, workers=1).images == 3


@pytest.mark.parametrize("levels", ["full,512,1024", [512, "full", 1024], ("512", "1024", "full")])
def test_levels_may_be_written_as_a_command_line_or_yaml_has_them(levels):
    assert ConvertSettings(levels=levels).levels == ("full", "1024", "512")
    assert ConvertSettings(levels=512).levels == ("512",)
    for wrong in ("0128,128", "²³", "15", "65537", "512,512", "-64", ""):
        with pytest.raises(ValueError, match="each once"):
            ConvertSettings(levels=wrong)
