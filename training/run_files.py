"""The files of a run folder, read as what they must be, and written so that they are there whole or not at all."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pandas as pd
import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from preprocessing.errors import RunError
from preprocessing.files import write_atomically
from preprocessing.settings import ConvertSettings

VALIDATION_COLUMNS = (
    *("image_id", "patient_id", "laterality", "view", "prediction_id", "cancer", "site_id", "machine_id"),
    *("age", "density", "implant", "fold", "prediction"),
)
_NEEDED = ("image_id", "patient_id", "prediction_id", "cancer", "site_id", "machine_id", "fold", "prediction")
_ID_COLUMNS = ("image_id", "patient_id", "laterality", "view", "prediction_id", "site_id", "machine_id", "density")
# What readers of metrics.jsonl rely on, by the kind of line.
_ALWAYS = {"epoch": ("epoch", "step"), "summary": ("advice",), "resources": ("time",)}
_Model = TypeVar("_Model", bound=BaseModel)
_WAY_OUT = "Restore the file, or train the fold again into another folder."


class Trained(BaseModel):
    """Which machines and sites the training pictures were of."""

    model_config = ConfigDict(extra="allow", frozen=True)

    machines: tuple[str | None, ...] | None = None
    sites: tuple[str | None, ...] | None = None


class Environment(BaseModel):
    """What environment.json holds; other modules go by the fields named here, the rest is for people.

    Attributes:
        fold: the number of the fold.
        store: folder of the store that it was trained on.
        store_fingerprint: of that store.
        store_settings: of that store's conversion.
        processes: how many trained it.
        held_out: digest of the image_ids that it held out.
        facts_read: digests of what training read of the table beside.
        training: what it was trained on.
    """

    model_config = ConfigDict(extra="allow", frozen=True)

    fold: int = Field(default=0, ge=0)
    store: str = ""
    store_fingerprint: str | None = None
    store_settings: ConvertSettings | None = None
    processes: int = Field(default=1, ge=1)
    held_out: str | None = None
    facts_read: dict[str, str] = {}  # `facts`, of earlier versions, were made otherwise
    training: Trained = Trained()


def read_environment(path: Path) -> Environment:
    """A fold's environment.json.

    Raises:
        RunError: it is missing, damaged, or of another version of this program.
    """
    return checked_json(
        Environment, path, read_json(path, _WAY_OUT), f"It is damaged, or of another version. {_WAY_OUT}"
    )


def read_validation(path: Path, fold: int) -> pd.DataFrame:
    """A fold's validation.csv: a row a picture, its ids and facts as text, "" where there is none.

    Raises:
        RunError: it is not there yet, or not what training writes of this fold: `prediction` from 0 to 1, `cancer` 0, 1
            or empty, each picture once.
    """
    if not path.is_file():
        raise RunError(f"{path}: not there yet. Train the fold with --resume, or restore the file if it has finished.")
    try:
        # Nothing but an empty cell lacks: NA is a site as good as another.
        found = pd.read_csv(path, dtype=dict.fromkeys(_ID_COLUMNS, str), keep_default_na=False, na_values=[""])
    except ValueError as error:  # pandas' own errors are ValueErrors
        raise RunError(f"{path}: not readable as a CSV ({' '.join(str(error).split())}). {_WAY_OUT}") from None
    for column in _NEEDED:
        if column not in found:
            raise RunError(f"{path}: it has no column {column}. {_WAY_OUT}")
    names = [name for name in ("cancer", "fold", "prediction", "age") if name in found]
    numbers = {name: pd.to_numeric(found[name], errors="coerce") for name in names}
    checks = {
        "prediction": numbers["prediction"].between(0, 1),
        "cancer": numbers["cancer"].isin([0, 1]) | found["cancer"].isna(),
        "fold": numbers["fold"] == fold,
        "image_id": ~found["image_id"].duplicated() & found["image_id"].notna(),
    }
    if "age" in found:
        checks["age"] = numbers["age"].notna() | found["age"].isna()
    for name, right in checks.items():
        if not right.all():
            line = int(np.flatnonzero(~right)[0]) + 2
            value = found[name].iloc[line - 2]
            raise RunError(f"{path}: line {line}: {name} cannot be {str(value)!r} there. {_WAY_OUT}")
    if found.empty:
        raise RunError(f"{path}: no picture in it. {_WAY_OUT}")
    return found.assign(**numbers).fillna(dict.fromkeys(_ID_COLUMNS, ""))


def read_config(path: Path) -> dict[str, Any]:
    """A fold's config.yaml as plain values.

    Raises:
        RunError: not readable.
    """
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8-sig"))
    except (yaml.YAMLError, UnicodeDecodeError):
        tree = None
    if not isinstance(tree, dict):
        raise RunError(f"{path}: not readable as YAML settings. {_WAY_OUT}")
    return tree


def write_json(path: Path, value: Any) -> None:
    """Write JSON atomically; NaN and infinity, which JSON lacks, become null."""
    write_atomically(path, (json.dumps(plain(value), indent=1, allow_nan=False) + "\n").encode())


def read_json(path: Path, way_out: str) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        RunError: there is no such file, or something else in it; ends with the way out.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise RunError(f"{path}: no such file. {way_out}") from None
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise RunError(f"{path}: not readable as a JSON object. {way_out}")
    return found


def checked_json(model: type[_Model], path: Path, found: dict[str, Any], way_out: str) -> _Model:
    """What a file holds, as a model.

    Raises:
        RunError: names the file and the first value that cannot be; ends with the way out.
    """
    try:
        return model.model_validate(found)
    except ValidationError as error:
        wrong = error.errors()[0]
        raise RunError(f"{path}: {'.'.join(map(str, wrong['loc']))}: {wrong['msg']}. {way_out}") from None


def write_table(path: Path, table: pd.DataFrame) -> None:
    """Write a CSV atomically; numbers in full, so that they read back equal."""
    write_atomically(path, table.to_csv(index=False, lineterminator="\n").encode())


def read_records(path: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl; one that a crash cut off, or that lacks what its kind always has, is passed over."""
    if not path.is_file():
        return []
    records = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict) and all(name in record for name in _ALWAYS.get(str(record.get("kind")), ())):
            records.append(record)
    return records


def drop_records_after(path: Path, epoch: int, step: int) -> None:
    """Forget the lines of metrics.jsonl that a run resumed in an epoch (from 0), after a step, writes again."""

    def stays(record: dict[str, Any]) -> bool:
        ended = record.get("kind") != "epoch" or record["epoch"] < epoch
        return ended and int(record.get("step") or 0) <= step

    if path.is_file():
        kept = [record for record in read_records(path) if stays(record)]
        write_atomically(path, "".join(json.dumps(record) + "\n" for record in kept).encode())


def plain(value: Any) -> Any:
    """A value as JSON can hold it: NaN and infinity are None, NumPy scalars plain ones."""
    if isinstance(value, dict):
        return {str(key): plain(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(inner) for inner in value]
    if isinstance(value, np.generic):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value
