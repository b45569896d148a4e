"""The store: one manifest row an image, its tiles, the rejected inputs, and the settings that made them.

A store is a folder with
    store.json         version and settings of the conversion
    manifest.parquet   one row an image, `COLUMNS` below and the source CSV's other columns as they were
    journal.jsonl      what is finished, for a run that continues an interrupted one
    rejected.csv       one row an input that did not make it, `REJECTED_COLUMNS`
    folds.csv          image_id, fold (written by `folds`)
    tiles/<level>/<patient>/<image>.tif (.j2k with codec htj2k)
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from preprocessing.errors import StoreError, command_line
from preprocessing.files import replaced, write_atomically
from preprocessing.settings import FULL, ConvertSettings

STORE_VERSION = 1

# name: (arrow type, meaning). Tile units: stored value minus `value_offset`, turned where `inverted`; see grayscale.py.
COLUMNS: dict[str, tuple[pa.DataType, str]] = {
    "image_id": (pa.string(), "the CSV's image_id, or the file's stem"),
    "patient_id": (pa.string(), "the CSV's patient_id, or a pseudonym"),
    "laterality": (pa.string(), "L or R, empty where unknown"),
    "view": (pa.string(), "CC, MLO, ML, LM, LMO, AT ..., empty where unknown"),
    "prediction_id": (pa.string(), "<patient>_<laterality> or the CSV's own"),
    "cancer": (pa.float32(), "0 or 1, NaN where unknown"),
    "site_id": (pa.string(), "the CSV's site_id, empty where unknown"),
    "machine_id": (pa.string(), "the CSV's machine_id, empty where unknown"),
    "age": (pa.float32(), "years, NaN where unknown"),
    "implant": (pa.float32(), "0 or 1, NaN where unknown"),
    "density": (pa.string(), "A to D, empty where unknown"),
    "source_path": (pa.string(), "relative to the images folder"),
    "source_bytes": (pa.int64(), "size of the source file"),
    "source_mtime_ns": (pa.int64(), "its modification time"),
    "source_sha256": (pa.string(), "its SHA-256"),
    "format": (pa.string(), "dicom, png, jpeg or tiff"),
    "transfer_syntax": (pa.string(), "DICOM transfer syntax UID, empty otherwise"),
    "decoder": (pa.string(), "what decoded it: numpy, dicomsdl, imagecodecs, pylibjpeg, zlib, tifffile or nvimgcodec"),
    "photometric": (pa.string(), "MONOCHROME1 or MONOCHROME2 (PS3.3 C.7.6.3.1.2)"),
    "presentation_intent": (pa.string(), "FOR PRESENTATION, FOR PROCESSING or empty (0008,0068)"),
    "policy": (pa.string(), "what the written policy says of unusual pictures, empty for usual ones"),
    "bits_stored": (pa.int16(), "bits of a stored value (0028,0101)"),
    "value_offset": (pa.int32(), "stored value of tile value 0 before turning: 0, or -2^(bits-1) for signed"),
    "inverted": (pa.bool_(), "tile = 2^bits_stored - 1 - (stored - value_offset): bright is dense in every tile"),
    "rescale_slope": (pa.float64(), "Modality LUT (PS3.3 C.11.1), 1 where absent"),
    "rescale_intercept": (pa.float64(), "Modality LUT, 0 where absent"),
    "window_center": (pa.list_(pa.float64()), "VOI windows as in the file, in modality units; empty where none"),
    "window_width": (pa.list_(pa.float64()), "their widths"),
    "window_function": (pa.list_(pa.string()), "LINEAR, LINEAR_EXACT or SIGMOID, one a window (PS3.3 C.11.2)"),
    "voi_lut": (pa.list_(pa.uint16()), "VOI LUT data, empty where none"),
    "voi_lut_first": (pa.int32(), "first modality value that the LUT maps"),
    "voi_lut_bits": (pa.int16(), "bits of a LUT entry"),
    "padding": (pa.list_(pa.int32()), "PixelPaddingValue and RangeLimit as stored values; those pixels are 0 in tiles"),
    "percentile_low": (pa.float32(), "0.5th percentile of the breast, in tile units"),
    "percentile_high": (pa.float32(), "99.5th percentile of the breast, in tile units"),
    "source_rows": (pa.int32(), "rows of the source picture"),
    "source_columns": (pa.int32(), "columns of the source picture"),
    "crop_top": (pa.int32(), "first row of the crop, in source pixels"),
    "crop_left": (pa.int32(), "first column of the crop"),
    "crop_height": (pa.int32(), "rows of the crop"),
    "crop_width": (pa.int32(), "columns of the crop"),
    "pixel_spacing": (pa.float32(), "millimetres a source pixel, NaN where unknown"),
}
# and, for each level L of the store:
LEVEL_COLUMNS: dict[str, tuple[pa.DataType, str]] = {
    "path": (pa.string(), "tile file relative to the store; levels of equal size share one"),
    "height": (pa.int32(), "rows"),
    "width": (pa.int32(), "columns"),
    "crc32": (pa.uint32(), "CRC-32 of the tile file's bytes"),
}
_ROWS_AT_ONCE = 20_000  # rows of a Parquet row group
# What the CSV says of the picture, as in the manifest, but empty where it says nothing; then what became of it.
REJECTED_FACTS = ("image_id", "patient_id", "laterality", "view", "prediction_id")
REJECTED_COLUMNS = (*REJECTED_FACTS, "source_path", "reason", "detail")


def level_column(field: str, level: str) -> str:
    """Name of a level's column: `path_512`, `crc32_full` ..."""
    return f"{field}_{level}"


@dataclass(frozen=True)
class Store:
    """A finished store, opened for reading."""

    root: Path
    settings: ConvertSettings

    @cached_property
    def manifest(self) -> pd.DataFrame:
        """One row an image, in order of patient_id and image_id, with a fresh 0-based index."""
        path = self.root / "manifest.parquet"
        try:
            return _checked(pq.read_table(path, page_checksum_verification=True), self.levels).to_pandas()
        except (pa.ArrowException, OSError, ValueError) as error:  # a UnicodeDecodeError is a ValueError
            if isinstance(error, OSError) and error.errno is not None:  # of the system, not of what is in the file
                error.filename = str(path)
                raise
            what = f"damaged ({error})" if type(error) is ValueError else "damaged"
            raise StoreError(
                f"{path}: {what}. Run the same convert again, without --repair: it makes it anew."
            ) from None

    @cached_property
    def rejected(self) -> pd.DataFrame:
        """Inputs that were not converted, with `REJECTED_COLUMNS`, text; empty where an older store lacks one."""
        path = self.root / "rejected.csv"
        if not path.is_file():
            raise StoreError(f"{path}: not there. Run the same convert again: it makes it anew.")
        try:
            found = pd.read_csv(path, dtype=str, keep_default_na=False)
        except ValueError:  # pandas' own errors are ValueErrors
            found = pd.DataFrame()
        if not {"image_id", "reason", "detail"} <= set(found.columns):
            raise StoreError(f"{path}: damaged. Run the same convert again: it makes it anew.")
        return found.reindex(columns=list(REJECTED_COLUMNS), fill_value="")

    @property
    def levels(self) -> tuple[str, ...]:
        """Levels from the largest to the smallest."""
        return self.settings.levels

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over every image's ids, side, view, label and tile checksums: equal stores have equal ones."""
        return self._digest("image_id", "patient_id", "laterality", "view", "prediction_id", "cancer")

    def is_known_as(self, fingerprint: object) -> bool:
        """Whether a run that recorded this fingerprint was trained on this store. Those before 2026-11-27 were over
        image ids, labels and checksums alone."""
        return fingerprint == self.fingerprint or fingerprint == self._digest("image_id", "cancer")

    def _digest(self, *names: str) -> str:
        columns = [*names, *(level_column("crc32", level) for level in self.levels)]
        rows = self.manifest[columns].to_csv(index=False, lineterminator="\n")
        return hashlib.sha256(rows.encode()).hexdigest()


def open_store(root: str | Path, finished: bool = True) -> Store:
    """Open a store.

    Args:
        root: its folder.
        finished: refuse one whose conversion has not ended.

    Raises:
        StoreError: nothing there, a store of another version, or an unfinished one.
    """
    root = Path(root)
    head = root / "store.json"
    if not head.is_file():
        raise StoreError(
            f"{root}: no store there (store.json is missing). Make one with: {command_line(f'convert --out {root}')}"
        )
    try:
        described = json.loads(head.read_text(encoding="utf-8"))
        version = described["version"]
    except (ValueError, KeyError, TypeError):
        raise StoreError(f"{head}: not readable as a store's head. Convert again into a new folder.") from None
    if version != STORE_VERSION:
        raise StoreError(
            f"{root}: store of version {version}; this program reads version {STORE_VERSION}. "
            "Convert again into a new folder."
        )
    if finished and not (root / "manifest.parquet").is_file():
        raise StoreError(f"{root}: its conversion has not finished (manifest.parquet is missing). Run convert again.")
    try:
        return Store(root, ConvertSettings.model_validate(described["settings"]))
    except (KeyError, ValueError):  # pydantic's own are ValueErrors
        raise StoreError(f"{head}: not readable as a store's head. Convert again into a new folder.") from None


def pick_level(levels: tuple[str, ...], height: int, width: int, target_height: int, target_width: int) -> str:
    """The smallest level that need not be enlarged to fit a picture into the target.

    Args:
        levels: the store's levels, largest first.
        height, width: size of the picture's crop in source pixels.
        target_height, target_width: size that the picture will be fitted into, keeping its aspect ratio.
    """
    scale = min(target_height / height, target_width / width)
    needed = min(scale, 1.0) * max(height, width)
    fitting = [level for level in levels if level == FULL or int(level) >= round(needed)]
    return fitting[-1] if fitting else levels[0]


def schema(levels: tuple[str, ...], extra: Mapping[str, pa.DataType]) -> pa.Schema:
    """The manifest's Arrow schema: `COLUMNS`, each level's, and the CSV's own."""
    fields = [pa.field(name, kind) for name, (kind, _) in COLUMNS.items()]
    fields += [
        pa.field(level_column(name, level), kind) for level in levels for name, (kind, _) in LEVEL_COLUMNS.items()
    ]
    return pa.schema(fields + [pa.field(name, kind) for name, kind in extra.items()])


def _checked(table: pa.Table, levels: tuple[str, ...]) -> pa.Table:
    """A manifest whose columns are all there, with their types: another program that has written it anew may have taken
    wider ones.

    Raises:
        ValueError: a column, or what must be in it, is not there.
        pa.ArrowException: values that do not fit its type.
    """
    for field in schema(levels, {}):
        at = table.schema.get_field_index(field.name)
        if at < 0:
            raise ValueError(f"no column {field.name}")
        column = table.column(at)
        if column.null_count and field.name == "image_id":
            raise ValueError(f"{field.name} is missing in {column.null_count} rows")
        if column.type != field.type:
            column = column.cast(field.type)
        if column.null_count and field.type == pa.string():
            column = pc.fill_null(column, "")
        table = table.set_column(at, field, column)
    return table.replace_schema_metadata(None)  # pandas' own would have it restore the types and index that it had


def write_manifest(
    root: Path, rows: Iterable[Mapping[str, Any]], levels: tuple[str, ...], extra: Mapping[str, pa.DataType]
) -> None:
    """Replace manifest.parquet atomically by these rows, which are taken as they come and never held together."""
    described = schema(levels, extra)
    options = {"compression": "zstd", "write_page_checksum": True}
    with replaced(root / "manifest.parquet") as file, pq.ParquetWriter(file, described, **options) as writer:
        iterator = iter(rows)
        while chunk := list(islice(iterator, _ROWS_AT_ONCE)):
            writer.write_table(pa.Table.from_pylist([dict(row) for row in chunk], schema=described))


def write_rejected(root: Path, rows: Iterable[Mapping[str, str]]) -> None:
    """Replace rejected.csv atomically."""
    with replaced(root / "rejected.csv") as file:
        text = io.TextIOWrapper(file, "utf-8", newline="")
        writer: csv.DictWriter[str] = csv.DictWriter(text, REJECTED_COLUMNS, extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        text.detach()


def write_head(root: Path, settings: ConvertSettings) -> None:
    """Write store.json, which says what the folder is and how it was made."""
    described = {"version": STORE_VERSION, "settings": settings.model_dump(mode="json")}
    write_atomically(root / "store.json", json.dumps(described, indent=1).encode() + b"\n")
