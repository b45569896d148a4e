"""The run: which pictures are missing, workers over them, the journal, and the manifest at the end.

The worker processes write tiles, this process alone writes the journal and the manifest. Whatever ends a run, the next
one with the same arguments does what is missing and comes to the same bytes.
"""

from __future__ import annotations

import logging
import time
import zlib
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from preprocessing import gpu_decode, ingest, table
from preprocessing import workers as workers_module
from preprocessing.errors import InputError, StoreError
from preprocessing.journal import Entry, Journal, locked
from preprocessing.manifest import (
    open_store,
    schema,
    write_head,
    write_manifest,
    write_rejected,
)
from preprocessing.progress import Progress, Report
from preprocessing.settings import FREE, ConvertSettings, as_text
from preprocessing.table import Source
from preprocessing.verify import verify

log = logging.getLogger(__name__)

# Reasons that may have lain in the machine rather than in the file: a later run tries again.
_PASSING = {"timeout", "crash", "memory", "internal", "unreadable", "too_large"}


@dataclass
class ConvertSummary:
    """What a run came to."""

    store: Path
    images: int = 0
    converted: int = 0
    unchanged: int = 0
    rejected: int = 0
    left_out: int = 0  # that the manifest had, and this table does not name
    on_gpu: int = 0
    bytes: int = 0
    seconds: float = 0.0
    by_reason: Counter[str] = field(default_factory=Counter)
    by_syntax: Counter[str] = field(default_factory=Counter)
    seconds_by_syntax: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))

    def __str__(self) -> str:
        lines = [
            f"{self.store}: {self.images} pictures ({self.converted} converted now in {self.seconds:.0f} s, "
            f"{self.unchanged} unchanged), {self.rejected} rejected."
        ]
        for name, count in (+self.by_syntax).most_common():
            took = self.seconds_by_syntax[name]
            lines.append(f"  {count} {name}: {took / count * 1000:.0f} ms a picture")
        if self.left_out:
            lines.append(
                f"  {self.left_out} that the store had are not in this table, and no longer in manifest.parquet; their "
                "tiles stay, and come back with a table that names them"
            )
        if self.on_gpu:
            lines.append(f"  {self.on_gpu} decoded on the GPU")
        for reason, count in self.by_reason.most_common():
            lines.append(f"  {count} rejected: {reason} (see {self.store / 'rejected.csv'})")
        return "\n".join(lines)


def convert(
    images: Path,
    csv: Path | None,
    out: Path,
    settings: ConvertSettings | None = None,
    workers: int = 0,
    scheduler: str | None = None,
    repair: bool = False,
    progress: Report | None = None,
    columns: Sequence[str] = (),
) -> ConvertSummary:
    """Convert a folder of pictures to a store, or complete one that was begun.

    Args:
        images: folder of the pictures.
        csv: their table; without it every file below `images` is taken.
        out: the store; made, or continued where the settings are the same.
        workers: processes on this machine, 0 for one a core.
        scheduler: address of a dask.distributed scheduler to run on instead.
        repair: verify every tile first and redo the damaged ones.
        progress: told of each finished file.
        columns: how the columns of another data set's table are taken; see `csv_file.map_columns`.

    Raises:
        InputError: the folder or the CSV does not hold what it must, or no scheduler answers.
        StoreError: `out` is no store, one made otherwise, in use by another run, or cannot be written.
    """
    settings = settings or ConvertSettings()
    images, out = images.absolute(), out.absolute()
    if not images.is_dir():
        raise InputError(
            f"{images}: no such folder of pictures. Give one with --images; cli.py synth makes a set to try."
        )
    listed = table.read_table(csv, columns) if csv is not None else table.walk_folder(images)
    if csv is not None:
        _require_some(images, csv, listed)
    _claim(out)
    with locked(out):
        _prepare(out, settings)
        left_out = _require_as_much(out, listed, csv is not None, repair)
        with Journal(out / "journal.jsonl") as journal:
            run = _Run(images, out, settings, listed, csv is not None, journal, progress)
            run.summary.left_out = left_out
            if repair:
                run.compares = not (out / "manifest.parquet").is_file()  # a run that was cut short has written none
                run.damaged = set() if run.compares else {problem.image_id for problem in verify(open_store(out))}
            run.convert(workers, scheduler)
            return run.finish()


class _Run:
    """One call of `convert`, in its three steps."""

    def __init__(
        self,
        images: Path,
        out: Path,
        settings: ConvertSettings,
        listed: pd.DataFrame,
        from_csv: bool,
        journal: Journal,
        progress: Report | None,
    ) -> None:
        self.damaged: set[str] = set()
        self.compares = False  # every tile with the journal's CRC-32
        self._images, self._out, self._settings = images, out, settings
        self._table, self._from_csv = listed, from_csv
        self._journal, self._progress = journal, progress
        self.summary = ConvertSummary(out)
        self._done = self._rejected = 0
        self._start = time.perf_counter()

    def convert(self, count: int, scheduler: str | None) -> None:
        """Run the workers over what is missing, and write down each outcome as it comes."""
        limits = workers_module.Limits.of(self._settings)
        if scheduler:
            outcomes = workers_module.run_cluster(ingest.stage, self._missing(), scheduler, limits, ingest.settle)
        else:
            outcomes = workers_module.run_local(ingest.stage, self._missing(), count, limits, ingest.settle)
        try:
            with closing(outcomes):
                for outcome in outcomes:
                    self._note(outcome)
            _clear(ingest.scratch_folder(self._out))
        except ingest.WriteError as error:
            raise StoreError(
                f"{self._out}: cannot be written: {error}. Make room and run the same command again; "
                "what is finished is kept."
            ) from None

    def finish(self) -> ConvertSummary:
        """Write manifest.parquet and rejected.csv from the journal."""
        patients: list[str] = []
        kept: list[int] = []
        for position, source in enumerate(self._sources()):
            entry = self._entry(source)
            if "facts" in entry:
                patients.append(table.text(source.columns, "patient_id") or entry["facts"]["patient_id"])
                kept.append(position)
        # In Arrow, for ten million of them.
        identifiers = self._table["image_id"].iloc[kept]
        keys = pa.table({"patient": pa.array(patients, pa.string()), "image": pa.array(identifiers, pa.string())})
        keys = keys.append_column("position", pa.array(kept, pa.int64()))
        order = keys.sort_by([("patient", "ascending"), ("image", "ascending")])["position"].to_numpy()
        known = set(schema(self._settings.levels, {}).names)
        extra = table.extra_columns(self._table, known) if self._from_csv else {}
        if self._from_csv and (ours := known & set(self._table.columns) - set(table.KNOWN)):
            log.info("Not carried from the table, for the manifest has its own: %s.", ", ".join(sorted(ours)))
        ordered = self._table.iloc[order]
        write_manifest(self._out, self._rows(ordered, extra), self._settings.levels, extra)
        write_rejected(self._out, self._rejections())
        self.summary.images = len(kept)
        self.summary.rejected = sum(self.summary.by_reason.values())
        self.summary.seconds = time.perf_counter() - self._start
        return self.summary

    def _sources(self, listed: pd.DataFrame | None = None) -> Iterator[Source]:
        return table.sources(self._images, self._table if listed is None else listed, self._from_csv)

    def _missing(self) -> Iterator[ingest.Job]:
        for source in self._sources():
            entry = self._journal.find(source.image_id)
            if entry is not None and self._still_right(entry, source):
                self.summary.unchanged += "facts" in entry
                self._tell(source.image_id, 0, "rejected" in entry)
            else:
                yield ingest.Job(self._images, self._out, self._settings, source)

    def _still_right(self, entry: Entry, source: Source) -> bool:
        if any(entry.get(name) != value for name, value in ingest.identity(self._images, source).items()):
            return False
        if "rejected" in entry:
            return entry["rejected"][0] not in _PASSING
        if source.image_id in self.damaged:
            return False
        if self.compares and not all(_has_crc32(self._out / tile[0], tile[3]) for tile in entry["tiles"].values()):
            return False
        return all(_has_size(self._out / tile[0], tile[4]) for tile in entry["tiles"].values())

    def _note(self, outcome: workers_module.Outcome) -> None:
        source: Source = outcome.task.source
        entry = outcome.result
        if outcome.failure is not None:
            seen = ingest.identity(self._images, source)
            entry = {"image_id": source.image_id, **seen}
            entry["rejected"] = [outcome.failure.reason, outcome.failure.detail]
        if outcome.again and (earlier := self._journal.find(source.image_id)) is not None:
            self._count(earlier, -1, 0.0)
        self._journal.append(entry)
        self._count(entry, 1, outcome.seconds)

    def _count(self, entry: Entry, by: int, seconds: float) -> None:
        """Add an outcome to the summary and to the progress, or take it back."""
        if "facts" in entry:
            name = syntax_name(entry["facts"].get("transfer_syntax", "")) or entry["facts"]["format"]
            self.summary.converted += by
            self.summary.on_gpu += by * (entry["facts"]["decoder"] == gpu_decode.NAME)
            self.summary.by_syntax[name] += by
            self.summary.seconds_by_syntax[name] += seconds
        self._tell(entry["image_id"], max(0, entry["size"]), "rejected" in entry, by)

    def _tell(self, current: str, size: int, rejected: bool, by: int = 1) -> None:
        self._done += by
        self._rejected += by * rejected
        self.summary.bytes += by * size
        if self._progress and by > 0:
            self._progress(Progress(self._done, len(self._table), self._rejected, self.summary.bytes, current))

    def _entry(self, source: Source) -> Entry:
        entry = self._journal.find(source.image_id)
        if entry is None:
            raise AssertionError(f"no outcome for image {source.image_id}")
        return entry

    def _rows(self, ordered: pd.DataFrame, extra: dict[str, pa.DataType]) -> Iterator[dict[str, Any]]:
        for source in self._sources(ordered):
            entry = self._entry(source)
            row = ingest.manifest_row(source.columns, entry["facts"], source.image_id)
            row |= ingest.tile_columns(entry["tiles"])
            yield row | {name: table.extra_value(source.columns, name, kind) for name, kind in extra.items()}

    def _rejections(self) -> Iterator[dict[str, str]]:
        for source in self._sources():
            entry = self._entry(source)
            if "rejected" in entry:
                reason, detail = entry["rejected"]
                self.summary.by_reason[reason] += 1
                yield {
                    "image_id": source.image_id,
                    "patient_id": table.text(source.columns, "patient_id"),
                    "laterality": table.laterality(source.columns),
                    "view": table.text(source.columns, "view").upper(),
                    "prediction_id": table.text(source.columns, "prediction_id"),
                    "source_path": source.path,
                    "reason": reason,
                    "detail": detail,
                }


def syntax_name(uid: str) -> str:
    """A transfer syntax's name, such as 'JPEG Lossless, Non-Hierarchical (Process 14)'; empty for no UID."""
    from pydicom.uid import UID

    return str(UID(uid).name) if uid else ""


def _require_some(images: Path, csv: Path, listed: pd.DataFrame) -> None:
    """A table of which no picture is there belongs to another folder: taken at its word, it would empty a store."""
    problem = ""
    for source in table.sources(images, listed, from_csv=True):
        if source.path:
            return
        problem = problem or source.problem
    raise InputError(
        f"{images}: none of the {len(listed)} pictures of {csv} is there (the first: {problem}). "
        "Give the folder that they lie in with --images."
    )


def _require_as_much(out: Path, listed: pd.DataFrame, from_csv: bool, repair: bool) -> int:
    """A call that left the table out would take all labels from a store that has some, and a repair with another table
    than the store's would take its pictures. How many pictures of the store this one does not name."""
    try:
        had = pq.read_table(out / "manifest.parquet", columns=["image_id", "cancer"]).to_pandas()
    except (OSError, ValueError, pa.ArrowException):  # none yet, or a damaged one
        return 0
    if not {"image_id", "cancer"} <= set(had):
        return 0
    if had["cancer"].notna().any() and "cancer" not in listed:
        given = "the one given has no column cancer" if from_csv else "none is given"
        raise InputError(
            f"{out}: its labels came with a table, and {given}. Give it with --csv, or convert into another folder "
            "with --out."
        )
    lacking = had["image_id"][~had["image_id"].isin(listed["image_id"])]
    if repair and len(lacking):
        raise InputError(
            f"{out}: --repair, but {len(lacking)} of its {len(had)} pictures (such as {lacking.iloc[0]}) are not among "
            "those given. Give the folder and the table that it was made from with --images and --csv."
        )
    return len(lacking)


def _claim(out: Path) -> None:
    """Make the store's folder, or see that what is there may be continued."""
    if out.exists() and not out.is_dir():
        raise StoreError(f"{out}: a file, not a folder. Give a folder for the store with --out.")
    try:
        out.mkdir(parents=True, exist_ok=True)
        # What watched a first try that failed is none of the user's.
        visible = [
            name.name for name in out.iterdir() if not name.name.startswith(".") and name.name != "metrics.jsonl"
        ]
    except OSError as error:
        raise StoreError(f"{out}: cannot be written: {error.strerror}.") from None
    if visible and "store.json" not in visible:
        raise StoreError(
            f"{out}: not empty and no store (it holds {sorted(visible)[0]}, no store.json). "
            "Give another folder with --out."
        )


def _prepare(out: Path, settings: ConvertSettings) -> None:
    """Under the lock: store.json says these settings, the scratch folder is there and empty."""
    head = out / "store.json"
    if head.is_file():
        made = open_store(out, finished=False).settings
        for name in ConvertSettings.model_fields:
            had, wanted = getattr(made, name), getattr(settings, name)
            if had != wanted and name not in FREE:
                raise StoreError(
                    f"{out}: made with {name} = {as_text(had)}, now {as_text(wanted)} is asked for. "
                    "Give the same settings, or another folder with --out."
                )
    try:
        if not head.is_file():
            write_head(out, settings)
        scratch = ingest.scratch_folder(out)
        scratch.mkdir(exist_ok=True)
        _clear(scratch)
        for left in out.glob(".*.tmp"):
            left.unlink()
    except OSError as error:
        raise StoreError(f"{out}: cannot be written: {error.strerror}.") from None


def _clear(scratch: Path) -> None:
    """Drop what crashed or killed workers left."""
    for left in scratch.iterdir():
        left.unlink()


def _has_crc32(path: Path, crc32: int) -> bool:
    try:
        return zlib.crc32(path.read_bytes()) == crc32
    except OSError:
        return False


def _has_size(path: Path, size: int) -> bool:
    try:
        return path.stat().st_size == size
    except OSError:
        return False
