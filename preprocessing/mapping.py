"""Tables of other data sets: which of their columns is which of ours, and what in them means cancer."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from preprocessing.errors import InputError

_EXPECTED = "expected NAME=COLUMN, such as patient_id=study_id, or NAME=COLUMN:VALUE|VALUE, 1 where the cell is one"


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


def one_row_a_picture(table: pd.DataFrame) -> pd.DataFrame:
    """Rows that share their `image_id` as one, in the place of the first: sets that list findings have several rows a
    picture. There is cancer where one of them says so; other cells are the first row's."""
    from preprocessing.table import number  # which imports this module

    if "cancer" in table.columns:
        known = table["cancer"].map(lambda cell: number({"": cell}, ""))
        cancer = known.groupby(table["image_id"]).transform("max")
        table = table.assign(cancer=table["cancer"].where(cancer.isna(), cancer.map("{:g}".format)))
    return table.drop_duplicates("image_id", ignore_index=True)
