"""Which pictures there are: the source CSV, checked, or a walk through a folder; and the file of each of its rows."""

from __future__ import annotations

import logging
import math
import os
import posixpath
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa

from preprocessing.csv_file import map_columns, read_cells
from preprocessing.errors import InputError

log = logging.getLogger(__name__)

# Tried in this order before the patient's folder is listed for any other ending.
_SUFFIXES = (".dcm", ".dicom", ".png", ".jpg", ".jpeg", ".tif", ".tiff", "")
# Files of a folder without CSV that nobody means as pictures.
_NO_PICTURES = {".csv", ".tsv", ".txt", ".json", ".jsonl", ".yaml", ".md", ".xml", ".html", ".pdf", ".zip", ".gz"}
_DIGITS = 15  # of any whole number that float64 holds
_EMPTY = {"", "nan", "none", "null", "na", "n/a"}
_FLAGS = {"0": 0.0, "1": 1.0, "true": 1.0, "false": 0.0, "yes": 1.0, "no": 0.0}
# Columns that mean something here; others of a table are carried as they are.
KNOWN = (
    *("patient_id", "image_id", "file", "laterality", "view", "prediction_id", "cancer", "age", "implant", "inverted"),
    *("site_id", "machine_id", "density", "BIRADS", "invasive"),
)
_SPELT = ("patient_id", "image_id", "laterality", "view", "cancer")
_IDS = ("patient_id", "image_id", "prediction_id", "file")
_LATERALITY = {"l": "L", "left": "L", "r": "R", "right": "R"}


@dataclass(frozen=True)
class Source:
    """One picture to convert.

    Attributes:
        image_id: unique within the run.
        path: of its file, relative to the images folder; empty where there is none.
        columns: the CSV's row as text; empty without a CSV.
        problem: why `path` is empty.
    """

    image_id: str
    path: str
    columns: Mapping[str, str] = field(default_factory=dict)
    problem: str = ""


def text(row: Mapping[str, Any], column: str) -> str:
    """A cell as text; empty where it is absent, NaN or says so."""
    value = row.get(column)
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    cell = str(value).strip()
    return "" if cell.lower() in _EMPTY else cell


def number(row: Mapping[str, Any], column: str) -> float:
    """A cell as a number, `true` and `false` as 1 and 0; NaN where it is absent, empty or no finite number."""
    cell = text(row, column).lower()
    if cell in _FLAGS:
        return _FLAGS[cell]
    try:
        value = float(cell)
    except ValueError:
        return math.nan
    return value if math.isfinite(value) else math.nan


def laterality(row: Mapping[str, Any]) -> str:
    """L, R, or empty."""
    return _LATERALITY.get(text(row, "laterality").lower(), "")


def stem(name: str) -> str:
    """A file's name without its ending; that of `1.2.840.113` has none."""
    base = posixpath.basename(name)
    front, ending = posixpath.splitext(base)
    return front if ending.lower() in _SUFFIXES or ending[1:].isalpha() else base


def read_table(csv: Path, columns: Sequence[str] = (), labels: bool = True) -> pd.DataFrame:
    """The source CSV as text, one row a picture, with `image_id` (where the CSV has none, the stem of `file`, or its
    path where two files share a stem).

    Args:
        csv: the file, in UTF-8 or, with a byte order mark, UTF-16; separated by commas, semicolons or tabs.
        columns: how another data set's columns are taken; see `csv_file.map_columns`. Rows of one picture become one.
        labels: `cancer`, `implant` and `age` must be what they should; without it a cell that is not counts as empty.

    Raises:
        InputError: the file is missing, empty or no CSV, lacks a column, names an image twice, or has an impossible
            value.
    """
    if not csv.is_file():
        raise InputError(f"{csv}: no such CSV file. Give one with --csv; cli.py synth makes a set to try.")
    table = map_columns(read_cells(csv), columns, csv)
    if not columns:  # else the call says what is what
        table = table.rename(columns=_spelt(list(table.columns), csv))
    table = table.assign(**{name: table[name].str.strip() for name in _IDS if name in table})
    wanted = ["patient_id"] if "file" in table.columns else ["patient_id", "image_id"]
    missing = [column for column in wanted if column not in table.columns]
    if missing:
        raise InputError(
            f"{csv}: column {missing[0]} is missing; found {', '.join(map(str, table.columns))}. "
            "Say which column it is, such as --column patient_id=study_id (convert and predict take it); "
            "docs/data-preparation.md has examples."
        )
    if table.empty:
        raise InputError(f"{csv}: no rows below its header; expected one row an image.")
    if labels and "cancer" not in table.columns:
        log.info("%s has no column cancer: its pictures have no labels.", csv)
    if "image_id" not in table.columns:
        table["image_id"] = _named_after(table["file"])
    if columns:
        table = one_row_a_picture(table)
    _check(table, csv, labels)
    return table.reset_index(drop=True)


def _spelt(found: Sequence[str], csv: Path) -> dict[str, str]:
    """How columns that a table cannot do without, or is unlabelled without, are spelt here, where they are spelt
    otherwise there."""
    spelt = {name: next((each for each in found if each.lower() == name), name) for name in _SPELT if name not in found}
    renamed = {there: name for name, there in spelt.items() if there != name}
    for there, name in renamed.items():
        log.info("%s: its column %s is taken for %s.", csv, there, name)
    return renamed


def one_row_a_picture(table: pd.DataFrame) -> pd.DataFrame:
    """Rows of one picture (of one `image_id`, `patient_id` and, where there is one, `file`) as one, in the place of the
    first: sets that list findings have several rows a picture. There is cancer where one of them says so; other cells
    are the first row's."""
    same = [name for name in ("image_id", "patient_id", "file") if name in table.columns]
    if "cancer" in table.columns:
        known = table["cancer"].map(lambda cell: number({"": cell}, ""))
        cancer = known.groupby([table[name] for name in same]).transform("max")
        table = table.assign(cancer=table["cancer"].where(cancer.isna(), cancer.map("{:g}".format)))
    merged = table.drop_duplicates(same)
    if len(merged) < len(table):
        log.info("%s rows are those of %s pictures.", f"{len(table):,}", f"{len(merged):,}")
    return merged


def walk_folder(images: Path) -> pd.DataFrame:
    """Every file below a folder that may be a picture, as `image_id` (its stem, or its path where two files share a
    stem) and `file`, in order of their paths. Linked folders are walked too, each folder once; stores are not.

    Raises:
        InputError: there is none, or a folder cannot be read.
    """

    def unreadable(error: OSError) -> None:
        raise InputError(
            f"{error.filename}: this folder cannot be read: {error.strerror}. Its pictures would be missed."
        )

    files: list[str] = []
    seen: set[str] = set()
    for folder, folders, names in os.walk(images, onerror=unreadable, followlinks=True):
        is_store = "store.json" in names and "tiles" in folders
        if is_store or (place := os.path.realpath(folder)) in seen:
            folders.clear()
            continue
        seen.add(place)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        inside = Path(folder).relative_to(images).as_posix()
        files += [
            _printable(posixpath.normpath(posixpath.join(inside, name)))
            for name in sorted(names)
            if not name.startswith(".") and Path(name).suffix.lower() not in _NO_PICTURES and name != "DICOMDIR"
        ]
    if not files:
        raise InputError(f"{images}: no pictures below this folder; expected DICOM, PNG, JPEG or TIFF files.")
    table = pd.DataFrame({"file": files}, dtype=str)
    table["image_id"] = _named_after(table["file"])
    return table


def _named_after(files: pd.Series) -> pd.Series:
    """Each file's stem, or its path where another file shares it."""
    stems = files.map(stem)
    shared = stems[~files.duplicated()]
    return stems.where(~stems.isin(shared[shared.duplicated()]), files)


def sources(images: Path, table: pd.DataFrame, from_csv: bool) -> Iterator[Source]:
    """One `Source` a row, in the table's order, each with its file looked up."""
    names = [str(column) for column in table.columns]
    for cells in table.itertuples(index=False, name=None):
        row = dict(zip(names, map(str, cells), strict=True))
        path, problem = find_file(images, row)
        yield Source(row["image_id"], path, row if from_csv else {}, problem)


def find_file(images: Path, row: Mapping[str, str]) -> tuple[str, str]:
    """A row's file relative to `images`, or an empty path and what was looked for.

    The column `file` names it where there is one; else it is `<patient_id>/<image_id>` or `<image_id>` with any ending.
    """
    if text(row, "file"):
        name = posixpath.normpath(text(row, "file"))
        if "\\" in name and not _there(images / name):  # written on Windows
            name = posixpath.normpath(name.replace("\\", "/")) if "\\x" not in name else name
        if not (_inside(name) and _there(images / name)):  # absolute, or relative to where the program runs
            whole, root = os.path.abspath(name), os.path.abspath(images)
            name = posixpath.relpath(whole, root) if whole.startswith(root.rstrip("/") + "/") else name
        if not _inside(name):
            return "", f"column file names {name}, which is not in the images folder"
        if _there(images / name):
            return name, ""
        return "", "its name is not UTF-8; rename it" if "\\x" in name else f"no file {name} in the images folder"
    patient, image = row.get("patient_id", ""), row["image_id"]
    if not (_plain(patient) and _plain(image)):
        return "", "its ids cannot be file names"
    for folder in (patient, "."):
        for suffix in (*_SUFFIXES, *(each.upper() for each in _SUFFIXES if each)):
            name = posixpath.normpath(posixpath.join(folder, image + suffix))
            if _there(images / name):
                return name, ""
    try:
        other = sorted(entry for entry in os.listdir(images / patient) if stem(entry) == image)
    except OSError:
        other = []
    if other:
        return posixpath.join(patient, other[0]), ""
    return "", f"no file {patient}/{image}.* in the images folder"


def extra_columns(table: pd.DataFrame, known: set[str]) -> dict[str, pa.DataType]:
    """Arrow types of the CSV's columns that the manifest does not have: float64 where every value is a number that it
    can hold as it is written, bool where every one is true or false, string otherwise."""
    types: dict[str, pa.DataType] = {}
    for column in map(str, table.columns):
        if column in known or column in {"file", "inverted"}:
            continue
        cells = table[column].str.strip()
        filled = cells[~cells.str.lower().isin(_EMPTY)]
        if len(filled) and len(filled) == len(cells) and filled.str.lower().isin(["true", "false"]).all():
            types[column] = pa.bool_()
        elif len(filled) and pd.to_numeric(filled, errors="coerce").notna().all() and not filled.map(_is_code).any():
            types[column] = pa.float64()
        else:
            types[column] = pa.string()
    return types


def _is_code(cell: str) -> bool:
    """Whether a whole number would lose something of how it is written: leading zeros, or digits past the fifteenth."""
    return cell.isdigit() and ((cell[0] == "0" and len(cell) > 1) or len(cell) > _DIGITS)


def extra_value(row: Mapping[str, str], column: str, kind: pa.DataType) -> Any:
    """A carried cell in the type that `extra_columns` gave its column."""
    if pa.types.is_boolean(kind):
        return number(row, column) == 1
    if pa.types.is_floating(kind):
        return number(row, column)
    return row.get(column, "")


def _check(table: pd.DataFrame, csv: Path, labels: bool) -> None:
    """Ids are there and unique, values are possible; the first that is not is an `InputError` with its line."""
    import pandera.pandas as pandera

    def allows(test: Any, expected: str) -> pandera.Check:
        return pandera.Check(lambda cells: cells.map(test).astype(bool), error=expected)

    def flag(cell: str) -> bool:
        return not text({"": cell}, "") or number({"": cell}, "") in (0, 1)

    def numeric(cell: str) -> bool:
        return not text({"": cell}, "") or not math.isnan(number({"": cell}, ""))

    def side(cell: str) -> bool:
        return not text({"": cell}, "") or bool(laterality({"laterality": cell}))

    filled = allows(lambda cell: bool(str(cell)), "an id")
    flags = allows(flag, "0, 1 or an empty cell")
    columns = {
        "image_id": pandera.Column(checks=filled),
        "patient_id": pandera.Column(checks=filled),
        "cancer": pandera.Column(checks=flags, required=False),
        "implant": pandera.Column(checks=flags, required=False),
        "inverted": pandera.Column(checks=flags, required=False),
        "age": pandera.Column(checks=allows(numeric, "a number or an empty cell"), required=False),
        "laterality": pandera.Column(checks=allows(side, "L, R or an empty cell"), required=False),
    }
    if not labels:
        columns = {name: column for name, column in columns.items() if name not in ("cancer", "implant", "age")}
    try:
        pandera.DataFrameSchema(columns).validate(table, lazy=True)
    except pandera.errors.SchemaErrors as errors:
        case = errors.failure_cases.iloc[0]
        line = int(case["index"]) + 2  # as `read_cells` has it
        raise InputError(
            f"{csv}, line {line}: {case['column']} is {case['failure_case']!r}; expected {case['check']}."
        ) from None
    duplicated = table["image_id"].duplicated(keep=False)
    if duplicated.any():
        first = table["image_id"][duplicated].iloc[0]
        lines = [int(index) + 2 for index in table.index[table["image_id"] == first]]
        raise InputError(
            f"{csv}: image_id {first!r} is on lines {lines[0]} and {lines[1]}; expected each image once "
            f"({int(duplicated.sum())} rows share their image_id)."
        )


def _printable(name: str) -> str:
    r"""A file name with the bytes that are not UTF-8 written as \xNN."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def _inside(name: str) -> bool:
    return bool(name) and not name.startswith("/") and name.split("/", maxsplit=1)[0] != ".." and "\0" not in name


def _plain(identifier: str) -> bool:
    return bool(identifier) and identifier not in {".", ".."} and not set(identifier) & set("/\\\0")


def _there(path: Path) -> bool:
    try:
        return os.path.lexists(path)
    except (OSError, ValueError):
        return False
