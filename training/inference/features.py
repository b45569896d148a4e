"""Feature extraction: what each fold's model sees in a store's pictures, as vectors for other programs.

`fold<K>.parquet` has a row a picture, in the manifest's order: the ids and facts of `run_files.VALIDATION_COLUMNS`, and
    held_out     bool: a picture that this fold was validated on, not trained
    prediction   float32, in [0, 1]: the model's probability of cancer
    embedding    float32 [F]: the pooled features that the head judges (1536 of an EfficientNet-B3)
Vectors of different folds are of different models and not to be compared with one another.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray
from torch import Tensor

from preprocessing.errors import StoreError
from preprocessing.files import replaced
from preprocessing.manifest import Store, open_store
from preprocessing.progress import Progress, Report
from training import run_files, runs
from training.failures import prediction_advice
from training.inference.assemble import open_ensemble, require_same_conversion
from training.inference.ensemble import Group, Member
from training.model import MammoModel
from training.timing import Untimed, timed

_ROW_GROUP = 4096  # rows that are written at once


@dataclass(frozen=True)
class FeaturesSummary:
    """What an extraction came to."""

    paths: tuple[Path, ...]
    pictures: int
    length: int
    faults: tuple[str, ...]

    def __str__(self) -> str:
        text = f"{self.pictures} vectors of {self.length} numbers each in {', '.join(map(str, self.paths))}."
        if self.faults:
            text += f" {len(self.faults)} pictures are left out; the first: {self.faults[0]}"
        return text


def extract(
    run: Path,
    store: Path,
    out: Path,
    *,
    device: str = "auto",
    batch_size: int | None = None,
    progress: Report | None = None,
    monitor: Any = None,
) -> FeaturesSummary:
    """Write the features of a store's pictures, a file each fold.

    Args:
        run: a run folder, or a single fold of one.
        store: the pictures; any store that was converted as the run's was.
        out: folder for the files; made.
        device: 'auto', 'cpu', 'cuda' or 'cuda:N'.
        batch_size: pictures a batch, where those of the run's validation do not fit here.
        progress: told of the pictures done, over all folds.
        monitor: times the wait for pictures, their transfer and the models; see monitor.py.

    Raises:
        RunError: the run is missing, has a fold that has not finished its first epoch, or is damaged, or memory ran out
            or the GPU failed.
        StoreError: no store, or one that was converted otherwise than the run's own.
    """
    opened = open_store(store)
    rows = opened.manifest.reset_index(drop=True)
    if rows.empty:
        raise StoreError(f"{opened.root}: no pictures there; rejected.csv says why.")
    found = runs.folds_of(run)
    ensemble = open_ensemble([fold.folder for fold in found], device, names=())
    require_same_conversion(ensemble, opened)
    ensemble = ensemble.in_batches(batch_size) if batch_size else ensemble
    paths = [out / f"fold{fold.fold}.parquet" for fold in found]
    faults: dict[int, str] = {}
    done = 0

    def tell(pictures: int) -> None:
        nonlocal done
        done += pictures
        if progress is not None:
            progress(Progress(done, len(found) * len(rows)))

    with ExitStack() as files, prediction_advice(ensemble.largest_batch, ensemble.longest_side):
        out.mkdir(parents=True, exist_ok=True)
        tables = []
        for fold, path in zip(found, paths, strict=True):
            file = files.enter_context(replaced(path))
            tables.append(files.enter_context(_Table(rows, fold, file)))
        for group in ensemble.groups:
            faults |= _fill(tables, group, opened, rows, ensemble.device, tell, monitor or Untimed())
    return FeaturesSummary(tuple(paths), len(rows) - len(faults), tables[0].length, tuple(faults.values()))


class _Table:
    """A fold's file as it grows; a context manager, at whose end the file is whole.

    Args:
        rows: the manifest's.
        fold: whose model sees them.
        file: to write to.
    """

    def __init__(self, rows: pd.DataFrame, fold: runs.FoldRun, file: IO[bytes]) -> None:
        facts = rows[[name for name in run_files.VALIDATION_COLUMNS if name in rows]]
        held_out = rows["image_id"].isin(fold.validation["image_id"])
        self._facts = pa.Table.from_pandas(facts, preserve_index=False).append_column("held_out", pa.array(held_out))
        self._file = file
        self._writer: pq.ParquetWriter | None = None
        # Filled in place: kept one by one, small arrays would lie between the batches' freed memory and break it up.
        self._waiting: tuple[NDArray[Any], ...] = ()
        self._count = 0

    def __enter__(self) -> _Table:
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        if kind is None and (self._count or self._writer is None):
            self._flush()
        if self._writer is not None:
            # What goes wrong already is what is told. Left open, the writer would end the file when it is gone itself.
            with nullcontext() if kind is None else suppress(Exception):
                self._writer.close()

    @property
    def length(self) -> int:
        """Of the vectors."""
        return self._waiting[-1].shape[1]

    def add(self, index: NDArray[np.int64], probability: NDArray[np.float32], features: NDArray[np.float32]) -> None:
        """Rows at positions [n], with probabilities [n] and features [n, F]."""
        columns = index, probability, features
        if not self._waiting:
            self._waiting = tuple(np.empty((_ROW_GROUP, *each.shape[1:]), each.dtype) for each in columns)
        done = 0
        while done < len(index):
            count = min(len(index) - done, _ROW_GROUP - self._count)
            for waiting, given in zip(self._waiting, columns, strict=True):
                waiting[self._count : self._count + count] = given[done : done + count]
            done, self._count = done + count, self._count + count
            if self._count == _ROW_GROUP:
                self._flush()

    def _flush(self) -> None:
        index, probability, features = (each[: self._count] for each in self._waiting)
        vectors = pa.FixedSizeListArray.from_arrays(pa.array(features.ravel()), features.shape[1])
        table = self._facts.take(pa.array(index))
        for name, column in {"prediction": pa.array(probability), "embedding": vectors}.items():
            table = table.append_column(name, column)
        self._writer = self._writer or pq.ParquetWriter(self._file, table.schema, compression="zstd")
        self._writer.write_table(table)
        self._count = 0


def _fill(
    tables: Sequence[_Table],
    group: Group,
    store: Store,
    rows: pd.DataFrame,
    device: torch.device,
    tell: Callable[[int], None],
    monitor: Any,
) -> dict[int, str]:
    """Add to each of the group's folds what its model makes of the pictures that can be read; why others cannot."""
    from dali_pipes.loader import Loader

    with Loader(store, rows, group.pipeline, group.loader, train=False, device=str(device)) as loader:
        for batch in timed(loader.epoch(0), monitor, "data"):
            with monitor.time("transfer"):
                image = batch["image"].to(device, non_blocking=True)
                index, ok = batch["index"].cpu().numpy(), batch["ok"].cpu().numpy()
            for member in group.members:
                with monitor.time("compute"):
                    probability, features = (each.cpu().numpy() for each in _outputs(member, image))
                tables[member.run].add(index[ok], probability[ok], features[ok])
                tell(len(ok))
        return loader.bad_samples


@torch.inference_mode()
def _outputs(member: Member, image: Tensor) -> tuple[Tensor, Tensor]:
    """Probabilities [B] and features [B, F] of pictures [B, C, H, W], both float32."""
    outputs = member.apply(cast(MammoModel, member.model).outputs, image)
    return torch.sigmoid(outputs["cancer"]).float(), outputs["embedding"].float()
