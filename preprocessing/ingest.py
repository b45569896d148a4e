"""One file in; its tiles and its facts, or a typed rejection, out. This is what a worker process runs."""

from __future__ import annotations

import hashlib
import math
import os
import traceback
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np

from preprocessing import decode, grayscale, policy, tiles
from preprocessing.breast import Breast, Crop, find_breast
from preprocessing.guard import Rejection, open_regular
from preprocessing.manifest import COLUMNS, LEVEL_COLUMNS, level_column
from preprocessing.settings import ConvertSettings
from preprocessing.table import Source, laterality, number, stem, text

_LONGEST_NAME = 120  # characters of a file name made from an id; file systems allow 255 bytes


class WriteError(Exception):
    """The store cannot be written: a full disk, a quota, a lost mount. Every other file would fail as well."""


@dataclass(frozen=True)
class Job:
    """What a worker needs besides the file: folders and settings; `keep` names the levels that are written, where not
    all are wanted. The others are made all the same, for smaller levels are made from larger ones."""

    images: Path
    store: Path
    settings: ConvertSettings
    source: Source = field(default_factory=lambda: Source("", ""))
    keep: tuple[str, ...] | None = None

    def __repr__(self) -> str:
        return f"Job({self.source.image_id!r})"


@dataclass(frozen=True)
class Staged:
    """A converted file that `settle` has not yet made last: its journal entry, and the tiles' temporary files by the
    places that they shall have."""

    entry: dict[str, Any]
    files: dict[Path, Path] = field(default_factory=dict, repr=False)  # their names differ from try to try


def stage(job: Job) -> Staged:
    """Convert one file: everything that costs a core; what is left is to wait for the disk.

    Returns:
        Its journal entry: `image_id`, what tells whether its source has changed, and either `facts` and `tiles` or
        `rejected` (reason and detail); and the tiles to settle.

    Raises:
        WriteError: the store cannot be written.
    """
    source = job.source
    entry: dict[str, Any] = {"image_id": source.image_id, **identity(job.images, source)}
    try:
        if not source.path:
            raise Rejection("absent", source.problem)
        levels, facts = _levels_and_facts(job.images / source.path, source.columns, job.settings)
    except Rejection as rejection:
        return Staged(entry | {"rejected": [rejection.reason, rejection.detail]})
    except MemoryError:
        raise
    except Exception as error:  # noqa: BLE001  a fault of ours costs this file alone, and says where it lies
        return Staged(entry | {"rejected": ["internal", _where(error)]})
    facts["source_path"] = source.path
    if not source.columns and facts["format"] != "dicom" and "/" in source.path:
        facts["patient_id"] = source.path.split("/", maxsplit=1)[0]
    kept = {name: level for name, level in levels.items() if job.keep is None or name in job.keep}
    described, files = _stage_tiles(job, kept, facts["patient_id"])
    return Staged(entry | {"facts": facts, "tiles": described}, files)


def settle(staged: Staged, durable: bool = True) -> dict[str, Any]:
    """Wait until the tiles are on the disk, name them, and return the journal entry, which may now be written. Tiles
    that need not be `durable` are named at once.

    Raises:
        WriteError: the store cannot be written.
    """
    try:
        for path, temporary in staged.files.items():
            tiles.settle(temporary, path, durable)
    except OSError as error:
        raise _write_error(error) from None
    return staged.entry


def identity(images: Path, source: Source) -> dict[str, Any]:
    """What a file's tiles depend on besides the settings: its place, size and time, and the CSV's cells that matter."""
    try:
        status = os.stat(images / source.path) if source.path else None
    except (OSError, ValueError):
        status = None
    return {
        "path": source.path,
        "size": status.st_size if status else -1,
        "mtime_ns": status.st_mtime_ns if status else 0,
        "inverted": number(source.columns, "inverted") == 1,
        "patient": text(source.columns, "patient_id"),
    }


def manifest_row(columns: Mapping[str, Any], facts: Mapping[str, Any], image_id: str) -> dict[str, Any]:
    """A manifest row from the CSV's cells and, where it has none, the file's own facts. `COLUMNS` only."""
    row = {name: facts[name] for name in COLUMNS if name in facts}
    patient = text(columns, "patient_id") or facts["patient_id"]
    side = laterality(columns) or facts.get("laterality", "")
    row |= {
        "image_id": image_id,
        "patient_id": patient,
        "laterality": side,
        "view": text(columns, "view").upper() or facts.get("view", ""),
        "prediction_id": text(columns, "prediction_id") or f"{patient}_{side}",
        "cancer": number(columns, "cancer"),
        "site_id": text(columns, "site_id"),
        "machine_id": text(columns, "machine_id"),
        "density": text(columns, "density").upper(),
    }
    for name in ("age", "implant"):
        given = number(columns, name)
        row[name] = facts.get(name, math.nan) if math.isnan(given) else given
    row["policy"] = policy.describe(facts.get("policy", ""), row["view"], row["implant"])
    return row


def safe_name(identifier: str) -> str:
    """An id as a file name: letters, digits, '.', '_' and '-' stay, all else is percent-encoded; never '.', '..',
    hidden, empty or too long, and different for different ids."""
    name = quote(identifier, safe="").replace("~", "%7E")
    if name.startswith("."):
        name = "%2E" + name[1:]
    if len(name) > _LONGEST_NAME:
        name = name[:80] + "%-" + hashlib.sha256(identifier.encode()).hexdigest()[:32]
    return name or "%"


def scratch_folder(store: Path) -> Path:
    """Where tiles lie while they are written; what a killed run leaves there is cleared by the next."""
    return store / ".scratch"


def _levels_and_facts(
    path: Path, row: Mapping[str, Any], settings: ConvertSettings
) -> tuple[dict[str, tiles.Level], dict[str, Any]]:
    with open_regular(path) as opened:
        decoded = decode.decode_open(opened, settings)
        sha256 = opened.sha256()
    header = decoded.header
    inverted = grayscale.is_inverted(header.photometric, header.rescale_slope) or number(row, "inverted") == 1
    picture = grayscale.to_tile_values(decoded, inverted)
    found = find_breast(picture, settings.crop_margin)
    crop = found.crop if settings.crop else Crop(0, 0, *picture.shape)
    low, high = _percentiles(picture, found)
    facts = {name: getattr(header, name) for name in COLUMNS if hasattr(header, name)}
    facts |= {
        "patient_id": text(row, "patient_id") or header.patient_id or stem(path.name),
        "source_path": path.name,
        "source_bytes": opened.bytes,
        "source_mtime_ns": opened.mtime_ns,
        "source_sha256": sha256,
        "decoder": decoded.decoder,
        "inverted": inverted,
        "percentile_low": low,
        "percentile_high": high,
        "source_rows": picture.shape[0],
        "source_columns": picture.shape[1],
        "crop_top": crop.top,
        "crop_left": crop.left,
        "crop_height": crop.height,
        "crop_width": crop.width,
    }
    return tiles.build_levels(picture[crop.slices], settings.levels), facts


def _percentiles(picture: tiles.Level, found: Breast) -> tuple[float, float]:
    """The 0.5th and 99.5th percentile of the breast's values, padding left out; always low < high."""
    rows, columns = (
        ((2 * np.arange(few) + 1) * many) // (2 * few)
        for few, many in zip(found.mask.shape, picture.shape, strict=True)
    )
    sample = picture[rows[:, None], columns]  # the pixel in the middle of each of the mask's
    values = sample[found.mask & (sample > 0)]
    if not values.size:
        values = picture.ravel()
    counts = np.cumsum(np.bincount(values))
    low, high = (int(np.searchsorted(counts, share * counts[-1])) for share in (0.005, 0.995))
    return float(low), float(max(high, low + 1))


def _stage_tiles(
    job: Job, levels: dict[str, tiles.Level], patient: str
) -> tuple[dict[str, list[Any]], dict[Path, Path]]:
    """Stage each distinct level once; path, rows, columns, CRC-32 and bytes by level, and the temporary files."""
    by_array: dict[int, list[Any]] = {}
    described: dict[str, list[Any]] = {}
    files: dict[Path, Path] = {}
    for name, level in levels.items():
        if id(level) not in by_array:
            file = safe_name(job.source.image_id) + tiles.suffix(job.settings.codec)
            path = "/".join(("tiles", name, safe_name(patient), file))
            try:
                done = tiles.stage_level(level, scratch_folder(job.store), job.settings.codec, job.settings.tile)
            except (OSError, tiles.TileError) as error:
                for temporary in files.values():
                    temporary.unlink(missing_ok=True)
                raise _write_error(error) from None
            files[job.store / path] = done.temporary
            by_array[id(level)] = [path, *level.shape, done.crc32, done.bytes]
        described[name] = by_array[id(level)]
    return described, files


def _write_error(error: OSError | tiles.TileError) -> WriteError:
    return WriteError(getattr(error, "strerror", None) or str(error))


def tile_columns(by_level: Mapping[str, list[Any]]) -> dict[str, Any]:
    """`LEVEL_COLUMNS` of each level from a journal entry's `tiles`."""
    return {
        level_column(column, name): value
        for name, values in by_level.items()
        for column, value in zip(LEVEL_COLUMNS, values, strict=False)
    }


def _where(error: Exception) -> str:
    """An unexpected error's type and place. Its message stays out: it may quote the file."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__} in {Path(frame.filename).name}:{frame.lineno}"
