"""Feature extraction: what each fold's model sees in a store's pictures, as vectors for other programs.

`fold<K>.parquet` has a row a picture, in the manifest's order: the ids and facts of `run_files.VALIDATION_COLUMNS`, and
    held_out     bool: a picture that this fold was validated on, not trained
    prediction   float32, in [0, 1]: the model's probability of cancer
    embedding    float32 [F]: the pooled features that the head judges (1536 of an EfficientNet-B3)
Vectors of different folds are of different models and not to be compared with one another.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray

from preprocessing.errors import StoreError
from preprocessing.files import replaced
from preprocessing.manifest import Store, open_store
from preprocessing.progress import Progress, Report
from training import run_files, runs
from training.assemble import open_ensemble, require_same_conversion
from training.ensemble import Ensemble
from training.failures import prediction_advice
from training.model import MammoModel
from training.timing import Untimed, timed


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
    ensembles = [open_ensemble([fold.folder], device, names=()) for fold in found]  # all, before any is worked on
    for ensemble in ensembles:
        require_same_conversion(ensemble, opened)
    paths, faults, features = [], {}, np.zeros((0, 0), np.float32)
    for number, (fold, own) in enumerate(zip(found, ensembles, strict=True)):
        ensemble = own.in_batches(batch_size) if batch_size else own

        def tell(done: int, before: int = number * len(rows)) -> None:
            if progress is not None:
                progress(Progress(before + done, len(found) * len(rows)))

        with prediction_advice(ensemble.largest_batch, ensemble.longest_side):
            index, probability, features, bad = _outputs(ensemble, opened, rows, tell, monitor or Untimed())
        faults |= bad
        held_out = rows["image_id"].isin(fold.validation["image_id"]).to_numpy()[index]
        out.mkdir(parents=True, exist_ok=True)
        path = out / f"fold{fold.fold}.parquet"
        _write(path, rows.iloc[index], held_out, probability, features)
        paths.append(path)
    pictures, length = features.shape
    return FeaturesSummary(tuple(paths), pictures, length, tuple(faults.values()))


def _outputs(
    ensemble: Ensemble, store: Store, rows: pd.DataFrame, tell: Any, monitor: Any
) -> tuple[NDArray[np.int64], NDArray[np.float32], NDArray[np.float32], dict[int, str]]:
    """Positions [n] of the pictures that could be read, probabilities [n] and features [n, F]; why others could not."""
    from dali_pipes.loader import Loader

    (group,) = ensemble.groups
    (member,) = group.members
    model = cast(MammoModel, member.model)
    layout = torch.channels_last if member.channels_last else torch.contiguous_format
    mixed = torch.autocast(ensemble.device.type, member.precision, enabled=member.precision != torch.float32)
    loader = Loader(store, rows, group.pipeline, group.loader, train=False, device=str(ensemble.device))
    columns: list[tuple[Any, ...]] = []
    done = 0
    with loader:
        for batch in timed(loader.epoch(0), monitor, "data"):
            with monitor.time("transfer"):
                image = batch["image"].to(ensemble.device, non_blocking=True).contiguous(memory_format=layout)
            with monitor.time("compute"), torch.inference_mode(), mixed:
                outputs = model.outputs(image)
            ok = batch["ok"].cpu().numpy()
            taken = batch["index"], torch.sigmoid(outputs["cancer"]), outputs["embedding"]
            columns.append(tuple(each.cpu().numpy()[ok] for each in taken))
            done += len(ok)
            tell(done)
        faults = loader.bad_samples
    index, probability, features = (np.concatenate(column) for column in zip(*columns, strict=True))
    return index, probability, features, faults


def _write(
    path: Path,
    rows: pd.DataFrame,
    held_out: NDArray[np.bool_],
    probability: NDArray[np.float32],
    features: NDArray[np.float32],
) -> None:
    facts = rows[[name for name in run_files.VALIDATION_COLUMNS if name in rows]]
    table = pa.Table.from_pandas(facts, preserve_index=False)
    vectors = pa.FixedSizeListArray.from_arrays(pa.array(features.ravel()), features.shape[1])
    columns = {"held_out": pa.array(held_out), "prediction": pa.array(probability), "embedding": vectors}
    for name, column in columns.items():
        table = table.append_column(name, column)
    with replaced(path) as file:
        pq.write_table(table, file, compression="zstd")
