"""The source CSV, checked; the walk through a folder; the file of each row."""

from __future__ import annotations

import gzip
import math
import os
from pathlib import Path

import pyarrow as pa
import pytest

from preprocessing import table
from preprocessing.errors import InputError

HEADER = "site_id,patient_id,image_id,laterality,view,age,cancer,implant,machine_id,difficult_negative_case,BIRADS"
ROW = "1,10006,462822612,L,CC,61.0,0,0,29,False,"


def csv(folder: Path, *lines: str, name: str = "train.csv") -> Path:
    path = folder / name
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return path


def touch(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"x")
    return path


def test_ids_stay_text_with_their_leading_zeros(tmp_path: Path) -> None:
    frame = table.read_table(csv(tmp_path, "patient_id,image_id", "007,0012", "7,12"))
    assert list(frame["image_id"]) == ["0012", "12"]
    assert list(frame["patient_id"]) == ["007", "7"]


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([], "the file is empty"),
        ([HEADER], "no rows below its header"),
        (["patient_id,laterality", "1,L"], "column image_id is missing; found patient_id, laterality"),
        (["image_id", "1"], "column patient_id is missing"),
        ([HEADER, ROW, ROW], "image_id '462822612' is on lines 2 and 3"),
        ([HEADER, ROW.replace("462822612", "")], "line 2: image_id is ''; expected an id"),
        ([HEADER, ROW.replace("61.0,0", "61.0,maybe")], "line 2: cancer is 'maybe'; expected 0, 1 or an empty cell"),
        ([HEADER, ROW.replace("61.0", "old")], "line 2: age is 'old'; expected a number"),
        ([HEADER, ROW.replace(",L,", ",up,")], "line 2: laterality is 'up'; expected L, R"),
        ([HEADER, ROW + ",1,2,3"], "not readable as a CSV"),
    ],
)
def test_a_csv_that_cannot_be_used_is_one_clear_line(tmp_path: Path, lines: list[str], message: str) -> None:
    path = csv(tmp_path, *lines)
    with pytest.raises(InputError) as caught:
        table.read_table(path)
    assert message in str(caught.value)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_csv_that_is_missing_or_binary_is_one_clear_line(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such CSV file"):
        table.read_table(tmp_path / "absent.csv")
    for data, message in (
        (b"\xff\xfe\x80patient_id,image_id\n\x80,\x81\n", "not UTF-16 at byte 26; save it as CSV UTF-8"),
        ("patient_id,image_id,view\n1,2,Krüger".encode("latin-1"), "not UTF-8 at byte 31; save it as CSV UTF-8"),
        (b"PK\x03\x04 [Content_Types].xml", "an Excel workbook, not a CSV"),
        (b"PK\x03\x04 and so on", "a ZIP archive"),
    ):
        (tmp_path / "binary.csv").write_bytes(data)
        with pytest.raises(InputError, match=message):
            table.read_table(tmp_path / "binary.csv")


@pytest.mark.parametrize("separator", [",", ";", "\t"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_what_spreadsheets_write_is_read(tmp_path: Path, separator: str, encoding: str, end: str) -> None:
    lines = ["Patient_ID , image_id,note,Cancer", " 007, 1 , ü x ,1", "", "8,2,,0", ",,,"]
    path = tmp_path / "sheet.csv"
    path.write_bytes(end.join(lines).replace(",", separator).encode(encoding))
    frame = table.read_table(path)
    assert frame.to_dict("list") == {
        "patient_id": ["007", "8"],
        "image_id": ["1", "2"],
        "note": [" ü x ", ""],
        "cancer": ["1", "0"],
    }


def test_line_ends_inside_a_cell_stay(tmp_path: Path) -> None:
    path = tmp_path / "sheet.csv"
    path.write_bytes(b'patient_id,image_id,note\n1,2,"a\r\nb\rc"\n')
    assert table.read_table(path)["note"].tolist() == ["a\r\nb\rc"]


def test_lines_are_counted_past_empty_ones(tmp_path: Path) -> None:
    path = csv(tmp_path, "patient_id,image_id,age", "1,1,50", "", "", "1,2,old")
    with pytest.raises(InputError, match="line 5: age is 'old'"):
        table.read_table(path)


def test_a_header_with_a_column_twice_is_refused(tmp_path: Path) -> None:
    for header in ("patient_id,image_id,view, view", 'patient_id,image_id,view,"view"'):
        with pytest.raises(InputError, match="has the column view twice"):
            table.read_table(csv(tmp_path, header, "1,1,CC,MLO"))


def test_a_table_may_be_packed_and_begin_or_end_with_blank_lines(tmp_path: Path) -> None:
    text = "\n \npatient_id,image_id,age\n1,1,old\n  \n"
    with pytest.raises(InputError, match="line 4: age is 'old'"):
        table.read_table(csv(tmp_path, text))
    (tmp_path / "train.csv.gz").write_bytes(gzip.compress(text.replace("old", "50").encode()))
    assert table.read_table(tmp_path / "train.csv.gz").to_dict("list") == {
        "patient_id": ["1"],
        "image_id": ["1"],
        "age": ["50"],
    }
    (tmp_path / "train.csv.gz").write_bytes(b"no gzip")
    with pytest.raises(InputError, match="not readable as gzip"):
        table.read_table(tmp_path / "train.csv.gz")


def test_a_mapping_finds_the_columns_as_the_table_spells_them(tmp_path: Path) -> None:
    path = csv(tmp_path, "Patient_ID,image_id,View,Age,Cancer", " 1 ,7,CC,062Y,Malignant")
    frame = table.read_table(path, ["patient_id=Patient_ID", "view=View", "cancer=Cancer:malignant"])
    assert frame[["patient_id", "view", "cancer", "Age"]].to_numpy().tolist() == [["1", "CC", "1", "062Y"]]
    carried = table.read_table(csv(tmp_path, "patient_id,image_id,Age,File", "1,7,062Y,a", name="b.csv"))
    assert list(carried.columns) == ["patient_id", "image_id", "Age", "File"]


def test_only_rows_of_one_picture_become_one(tmp_path: Path) -> None:
    """Where ids count within a patient, rows of different patients are no findings of one picture."""
    lines = ["patient_id,image_id,side,cancer", "001,1,L,0", "002,1,L,1", "002,1,L,0"]
    with pytest.raises(InputError, match="image_id '1' is on lines 2 and 3"):
        table.read_table(csv(tmp_path, *lines), ["laterality=side"])
    frame = table.read_table(csv(tmp_path, lines[0], *lines[2:]), ["laterality=side"])
    assert frame[["patient_id", "cancer"]].to_numpy().tolist() == [["002", "1"]]


def test_a_column_file_may_be_absolute_or_relative_to_the_program(tmp_path: Path, monkeypatch) -> None:
    touch(tmp_path / "images" / "a" / "1.dcm")
    touch(tmp_path / "elsewhere" / "1.dcm")
    monkeypatch.chdir(tmp_path)
    rows = [f"{tmp_path}/images/a/1.dcm", "images/a/1.dcm", "a/1.dcm", "images/../images/a/1.dcm"]
    for images in (Path("images"), tmp_path / "images", Path("images/../images/")):
        for name in rows:
            assert table.find_file(images, {"image_id": "1", "file": name}) == ("a/1.dcm", "")
        path, problem = table.find_file(images, {"image_id": "1", "file": f"{tmp_path}/elsewhere/1.dcm"})
        assert path == ""
        assert "not in the images folder" in problem


@pytest.mark.parametrize(
    ("cell", "value"),
    [("1", 1), ("1.0", 1), ("True", 1), ("false", 0), ("Yes", 1), ("no", 0), (0, 0), (61.5, 61.5), ("1e2", 100)],
)
def test_numbers_are_read_however_they_are_written(cell: object, value: float) -> None:
    assert table.number({"a": cell}, "a") == value


@pytest.mark.parametrize("cell", ["", "nan", "NaN", None, float("nan"), "None", "inf", "abc"])
def test_what_is_no_number_is_nan(cell: object) -> None:
    assert math.isnan(table.number({"a": cell}, "a"))


@pytest.mark.parametrize(
    ("file", "row"),
    [
        ("10006/1.dcm", {"patient_id": "10006", "image_id": "1"}),
        ("10006/1.png", {"patient_id": "10006", "image_id": "1"}),
        ("10006/1", {"patient_id": "10006", "image_id": "1"}),
        ("10006/1.JPEG", {"patient_id": "10006", "image_id": "1"}),
        ("1.tif", {"patient_id": "10006", "image_id": "1"}),
        ("1.DCM", {"patient_id": "10006", "image_id": "1"}),
        ("images/p_1.jpg", {"patient_id": "10006", "image_id": "1", "file": "images/p_1.jpg"}),
        ("images/p_1.jpg", {"patient_id": "10006", "image_id": "1", "file": "./images\\p_1.jpg"}),
    ],
)
def test_a_rows_file_is_found_whatever_its_ending(tmp_path: Path, file: str, row: dict[str, str]) -> None:
    touch(tmp_path / file)
    touch(tmp_path / "10006" / "12.dcm")
    assert table.find_file(tmp_path, row) == (file, "")


def test_a_file_is_never_another_pictures(tmp_path: Path) -> None:
    """Neither one whose name merely begins so, nor another patient's of that name beside the folders."""
    row = {"patient_id": "10006", "image_id": "1"}
    touch(tmp_path / "10006" / "12.pic")
    assert table.find_file(tmp_path, row)[0] == ""
    touch(tmp_path / "1.dcm")
    touch(tmp_path / "10006" / "1.png")
    assert table.find_file(tmp_path, row) == ("10006/1.png", "")


@pytest.mark.parametrize(
    "row",
    [
        {"patient_id": "../outside", "image_id": "1"},
        {"patient_id": "p", "image_id": "../../outside/1"},
        {"patient_id": "..", "image_id": "outside"},
        {"patient_id": "p", "image_id": "1\0"},
        {"patient_id": "p", "image_id": "x" * 5000},
        {"patient_id": "p", "image_id": "1", "file": "../outside/1.dcm"},
        {"patient_id": "p", "image_id": "1", "file": "/etc/passwd"},
        {"patient_id": "p", "image_id": "1", "file": "a/../../outside/1.dcm"},
    ],
)
def test_ids_and_files_never_lead_out_of_the_images_folder(tmp_path: Path, row: dict[str, str]) -> None:
    touch(tmp_path / "outside" / "1.dcm")
    (tmp_path / "images").mkdir()
    path, problem = table.find_file(tmp_path / "images", row)
    assert path == ""
    assert problem


def test_a_walk_names_pictures_by_their_stem_and_by_their_path_where_stems_repeat(tmp_path: Path) -> None:
    for name in ("a/1.dcm", "b/1.dcm", "b/2.png", "1.2.840.113", "notes.txt", ".hidden.dcm", "DICOMDIR"):
        touch(tmp_path / name)
    frame = table.walk_folder(tmp_path)
    assert dict(zip(frame["image_id"], frame["file"], strict=True)) == {
        "1.2.840.113": "1.2.840.113",
        "a/1.dcm": "a/1.dcm",
        "b/1.dcm": "b/1.dcm",
        "2": "b/2.png",
    }


def test_a_name_that_is_not_utf8_becomes_a_row_that_says_so(tmp_path: Path) -> None:
    touch(tmp_path / "good.dcm")
    with open(os.fsencode(tmp_path) + b"/caf\xe9.dcm", "wb"):
        pass
    found = list(table.sources(tmp_path, table.walk_folder(tmp_path), from_csv=False))
    assert [(source.path, bool(source.problem)) for source in found] == [("", True), ("good.dcm", False)]
    assert "not UTF-8" in found[0].problem


def test_a_folder_without_pictures_is_one_clear_line(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no pictures below this folder"):
        table.walk_folder(tmp_path)


def test_other_columns_are_carried_with_a_type_that_fits_every_row(tmp_path: Path) -> None:
    path = csv(tmp_path, "patient_id,image_id,BIRADS,flag,seen,note,file", "1,1,2,True,True,x,a", "1,2,,False,,,b")
    frame = table.read_table(path)
    types = table.extra_columns(frame, {"patient_id", "image_id"})
    text = dict.fromkeys(("seen", "note"), pa.string())  # an empty cell is neither true nor false
    assert types == {"BIRADS": pa.float64(), "flag": pa.bool_()} | text
    row = dict(zip(frame.columns, frame.iloc[1], strict=True))
    assert math.isnan(table.extra_value(row, "BIRADS", types["BIRADS"]))
    assert table.extra_value(row, "flag", types["flag"]) is False
    assert table.extra_value(row, "note", types["note"]) == ""


def test_codes_that_look_like_numbers_stay_as_they_are_written(tmp_path: Path) -> None:
    cells = ("007,123456789012345678,0.30000000000000004,0", "12,1,0.5,10")
    path = csv(tmp_path, "patient_id,image_id,code,long,score,count", *(f"p,{i},{row}" for i, row in enumerate(cells)))
    frame = table.read_table(path)
    types = table.extra_columns(frame, {"patient_id", "image_id"})
    assert types == {"code": pa.string(), "long": pa.string(), "score": pa.float64(), "count": pa.float64()}
    assert table.extra_value({"code": "007"}, "code", types["code"]) == "007"


def test_a_walk_follows_links_once_and_leaves_stores_out(tmp_path: Path) -> None:
    touch(tmp_path / "elsewhere" / "2.dcm")
    touch(tmp_path / "images" / "a" / "1.dcm")
    (tmp_path / "images" / "b").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "images" / "a" / "round").symlink_to(tmp_path / "images")
    touch(tmp_path / "images" / "store" / "store.json")
    touch(tmp_path / "images" / "store" / "tiles" / "512" / "3.tif")
    assert table.walk_folder(tmp_path / "images")["file"].tolist() == ["a/1.dcm", "b/2.dcm"]


def test_a_folder_that_cannot_be_read_is_named_and_not_passed_over(tmp_path: Path, monkeypatch) -> None:
    touch(tmp_path / "a" / "1.dcm")
    touch(tmp_path / "closed" / "2.dcm")
    scandir = os.scandir

    def guarded(path):
        if Path(path).name == "closed":
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", guarded)
    with pytest.raises(InputError, match="closed: this folder cannot be read: Permission denied"):
        table.walk_folder(tmp_path)


def test_an_absolute_path_inside_the_images_folder_is_taken_and_another_is_named(tmp_path: Path) -> None:
    touch(tmp_path / "images" / "a" / "1.dcm")
    images = tmp_path / "images"
    assert table.find_file(images, {"image_id": "1", "file": str(images / "a" / "1.dcm")}) == ("a/1.dcm", "")
    path, problem = table.find_file(images, {"image_id": "1", "file": "/data/a/1.dcm"})
    assert not path
    assert problem == "column file names /data/a/1.dcm, which is not in the images folder"


VINDR = (
    "study_id,series_id,laterality,image_id,view_position,breast_birads,breast_density,split",
    "a1,s1,L,i1,CC,BI-RADS 2,DENSITY C,training",
    "a1,s1,R,i2,MLO,BI-RADS 5,DENSITY C,training",
    "b2,s2,L,i3,CC,BI-RADS 4,DENSITY B,test",
)
CBIS = (
    "patient_id,breast_density,left or right breast,image view,abnormality id,pathology,image file path",
    "P_00001,3,LEFT,CC,1,MALIGNANT,Mass-Training_P_00001_LEFT_CC/1.3/9.5/000000.dcm",
    "P_00001,3,LEFT,MLO,1,BENIGN,Mass-Training_P_00001_LEFT_MLO/1.3/9.7/000000.dcm",
    "P_00004,3,RIGHT,CC,1,BENIGN_WITHOUT_CALLBACK,Mass-Training_P_00004_RIGHT_CC/2.4/8.1/000000.dcm",
    "P_00004,3,RIGHT,CC,2,MALIGNANT,Mass-Training_P_00004_RIGHT_CC/2.4/8.1/000000.dcm",
)


def test_vindr_mammo_is_read_by_a_column_mapping(tmp_path: Path) -> None:
    mapping = ("patient_id=study_id", "view=view_position", "cancer=breast_birads:BI-RADS 4|BI-RADS 5")
    frame = table.read_table(csv(tmp_path, *VINDR), mapping)
    assert list(frame["patient_id"]) == ["a1", "a1", "b2"]
    assert list(frame["view"]) == ["CC", "MLO", "CC"]
    assert list(frame["cancer"]) == ["0", "1", "1"]
    assert list(frame["split"]) == ["training", "training", "test"]  # the set's own columns stay


def test_cbis_ddsm_with_several_findings_a_picture_is_read_by_a_column_mapping(tmp_path: Path) -> None:
    mapping = (
        "laterality=left or right breast",
        "view=image view",
        "file=image file path",
        "cancer=pathology:malignant",
    )
    frame = table.read_table(csv(tmp_path, *CBIS), mapping)
    assert list(frame["cancer"]) == ["1", "0", "1"]  # the last has two findings, one of them malignant
    assert list(frame["image_id"]) == list(frame["file"])  # all are called 000000.dcm
    assert [table.laterality(row) for row in frame.to_dict("records")] == ["L", "L", "R"]


@pytest.mark.parametrize(
    ("mapping", "message"),
    [
        ("patient_id", "expected NAME=COLUMN"),
        ("patient_id=", "expected NAME=COLUMN"),
        ("view=projection", "has no column 'projection'; found study_id, series_id"),
        ("cancer=birads:5", "has no column 'birads'"),
        ("cancer=breast_birads:5", "no cell of 'breast_birads' in .* is '5'; found BI-RADS 2"),
    ],
)
def test_a_mapping_that_fits_nothing_is_one_clear_line(tmp_path: Path, mapping: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        table.read_table(csv(tmp_path, *VINDR), (mapping,))


def test_without_a_mapping_a_repeated_picture_stays_an_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="lines 2 and 3"):
        table.read_table(csv(tmp_path, "patient_id,image_id", "a,1", "a,1"))
