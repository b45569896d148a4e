"""Files of a run that are not what training writes there end in one sentence: which file, what in it, what to do."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd
import pytest

from preprocessing.errors import RunError
from training import run_files

ROWS = pd.DataFrame(
    {
        "image_id": ["01", "02", "03"],
        "patient_id": ["1", "1", "2"],
        "prediction_id": ["1_L", "1_R", "2_L"],
        "cancer": [0, 1, None],
        "site_id": ["NA", "2", "2"],
        "machine_id": "49",
        "age": [50.5, None, 61],
        "fold": 1,
        "prediction": [0.0, 1.0, 0.25],
    }
)


def test_a_validation_table_reads_back_as_it_was_written(tmp_path: Path):
    run_files.write_table(tmp_path / "validation.csv", ROWS)
    found = run_files.read_validation(tmp_path / "validation.csv", 1)
    pd.testing.assert_frame_equal(found, ROWS, check_dtype=False)


@pytest.mark.parametrize(
    ("column", "value", "said"),
    [
        ("prediction", 1.7, "prediction cannot be '1.7'"),
        ("prediction", "x", "prediction cannot be 'x'"),
        ("prediction", None, "prediction cannot be 'nan'"),
        ("prediction", "inf", "prediction cannot be 'inf'"),
        ("cancer", 2, "cancer cannot be '2.0'"),
        ("cancer", "yes", "cancer cannot be 'yes'"),
        ("fold", 0, "fold cannot be '0'"),
        ("age", "old", "age cannot be 'old'"),
        ("image_id", "01", "image_id cannot be '01'"),
        ("image_id", None, "image_id cannot be 'nan'"),
    ],
)
def test_an_impossible_value_is_named_with_its_line(tmp_path: Path, column: str, value: object, said: str):
    path = tmp_path / "validation.csv"
    cells = ROWS.astype(object)
    cells.loc[1, column] = value
    run_files.write_table(path, cells)
    with pytest.raises(RunError, match=rf"validation.csv: line 3: {said} there\. Restore the file, or train"):
        run_files.read_validation(path, 1)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "not readable as a CSV"),
        (b"image_id,a\n1,2,3\n1,2,3,4,5\n", "not readable as a CSV"),
        (b"\xff\xfe\x00", "not readable as a CSV"),
        (",".join(ROWS.columns).encode() + b"\n", "no picture in it"),
    ],
)
def test_a_table_that_is_none_is_named_in_one_line(tmp_path: Path, content: bytes, said: str):
    path = tmp_path / "validation.csv"
    path.write_bytes(content)
    with pytest.raises(RunError, match=f"validation.csv: {said}") as raised:
        run_files.read_validation(path, 1)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("content", [b"", b"[]", b"null", b"3", b'"x"', b"{", b"\xff\xfe"])
def test_json_of_another_type_is_named(tmp_path: Path, content: bytes):
    path = tmp_path / "environment.json"
    path.write_bytes(content)
    with pytest.raises(RunError, match=r"environment.json: not readable as a JSON object\. Restore"):
        run_files.read_json(path, "Restore it.")


def test_json_that_is_not_there_is_told_apart_and_a_byte_order_mark_does_no_harm(tmp_path: Path):
    path = tmp_path / "environment.json"
    with pytest.raises(RunError, match=r"environment.json: no such file"):
        run_files.read_json(path, "Restore it.")
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps({"fold": 3, "gpu": "H100"}).encode())
    environment = run_files.read_environment(path)
    assert environment.fold == 3
    assert json.loads(environment.model_dump_json(exclude_unset=True)) == {"fold": 3, "gpu": "H100"}


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({"fold": "first"}, "fold: "),
        ({"processes": 0}, "processes: "),
        ({"facts_read": []}, "facts_read: "),
        ({"store": None}, "store: "),
        ({"store_settings": {"bogus": 1}}, "store_settings.bogus: "),
    ],
)
def test_an_environment_of_another_version_is_named(tmp_path: Path, content: dict, said: str):
    path = tmp_path / "environment.json"
    path.write_text(json.dumps(content))
    with pytest.raises(RunError, match=rf"environment.json: {said}.* of another version"):
        run_files.read_environment(path)


def test_lines_of_records_that_are_none_are_passed_over(tmp_path: Path):
    path = tmp_path / "metrics.jsonl"
    good = {"kind": "epoch", "epoch": 0, "step": 4}
    other = [[], None, 3, {"kind": "epoch", "epoch": 1}, {"kind": "summary"}, {"kind": "resources"}]
    lines = [*map(json.dumps, [good, *other])]
    path.write_bytes("\n".join(lines).encode() + b'\n{"kind": "\xff\n{"kind": "ep')
    assert run_files.read_records(path) == [good]
