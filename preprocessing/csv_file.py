"""A CSV file as a table of text: whatever programs write, and the columns of other data sets by the names of ours."""

from __future__ import annotations

import csv as csv_module
import gzip
import io
import warnings
import zlib
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from preprocessing.errors import InputError

_EXPECTED = "expected NAME=COLUMN, such as patient_id=study_id, or NAME=COLUMN:VALUE|VALUE, 1 where the cell is one"


def read_cells(csv: Path) -> pd.DataFrame:
    """A table's cells as text, its columns' names without the blanks around them; the index counts lines from the
    second, of which those that are empty are left out.

    Args:
        csv: a file in UTF-8 or, with a byte order mark, UTF-16, separated by commas, semicolons or tabs; `.gz` is
            unpacked.

    Raises:
        InputError: it is empty, no CSV, in another encoding, or has a column twice.
    """
    data = csv.read_bytes()
    if csv.suffix.lower() == ".gz":
        try:
            data = gzip.decompress(data)
        except (OSError, EOFError, zlib.error) as error:
            raise InputError(f"{csv}: not readable as gzip: {error}.") from None
    if data.startswith(b"PK\3\4"):
        what = (
            "an Excel workbook, not a CSV; save it as CSV UTF-8" if b"[Content_Types].xml" in data else "a ZIP archive"
        )
        raise InputError(f"{csv}: {what}.")
    encoding = "utf-16" if data.startswith((b"\xff\xfe", b"\xfe\xff")) else "utf-8-sig"
    try:
        content = data.decode(encoding)
    except UnicodeDecodeError as error:
        name = encoding.removesuffix("-sig").upper()
        raise InputError(f"{csv}: not {name} at byte {error.start:,}; save it as CSV UTF-8.") from None
    if "\n" not in content:
        content = content.replace("\r", "\n")  # which ends lines on older Macs
    started = content.lstrip()
    before = content[: len(content) - len(started)].count("\n")  # empty lines above the header
    header = started.partition("\n")[0]
    separator = "," if "," in header else max(",;\t", key=header.count)
    names = [name.strip() for name in next(iter(csv_module.reader([header], delimiter=separator)), [])]
    if doubled := [name for name in names if name and names.count(name) > 1]:
        raise InputError(f"{csv}: its header has the column {doubled[0]} twice.")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", pd.errors.ParserWarning)
            table = pd.read_csv(
                io.StringIO(started),
                sep=separator,
                dtype=str,
                keep_default_na=False,
                index_col=False,
                skip_blank_lines=False,
            )
    except pd.errors.EmptyDataError:
        raise InputError(f"{csv}: the file is empty; expected a header line and one row an image.") from None
    except (pd.errors.ParserError, pd.errors.ParserWarning) as error:
        raise InputError(f"{csv}: not readable as a CSV: {' '.join(str(error).split())}") from None
    table = table[table.apply(lambda cells: cells.str.strip() != "").any(axis=1)]
    table.index += before
    return table.rename(columns=lambda name: str(name).strip())


def map_columns(table: pd.DataFrame, given: Sequence[str], csv: Path) -> pd.DataFrame:
    """The table with further columns, filled as told; the source's own columns stay.

    Args:
        table: all cells as text.
        given: `NAME=COLUMN` copies a column; `NAME=COLUMN:VALUE|VALUE` is 1 where the cell is one of the values, in
            any case, and 0 elsewhere.
        csv: for messages.

    Raises:
        InputError: a mapping that cannot be read, or a column or value that the table does not have.
    """
    mapped = table.copy()
    for mapping in given:
        name, equals, source = (part.strip() for part in mapping.partition("="))
        if not (name and equals and source):
            raise InputError(f"--column {mapping}: {_EXPECTED}.")
        if source in table.columns:
            mapped[name] = table[source]
            continue
        column, _, listed = source.rpartition(":")
        values = {value.strip().lower() for value in listed.split("|")}
        if column not in table.columns:
            there = ", ".join(map(str, table.columns))
            raise InputError(f"--column {mapping}: {csv} has no column {column or source!r}; found {there}.")
        cells = table[column].str.strip().str.lower()
        unseen = sorted(values - set(cells))
        if unseen:
            there = ", ".join(sorted(table[column].unique())[:12])
            raise InputError(f"--column {mapping}: no cell of {column!r} in {csv} is {unseen[0]!r}; found {there}.")
        mapped[name] = cells.isin(values).astype(int).astype(str)
    return mapped
