"""Trains a fold, or all of them: what is trained on, where it goes, and whether it may."""

from __future__ import annotations

import logging
import math
import shlex
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from preprocessing.errors import InputError, RunError
from preprocessing.manifest import Store, open_store
from training import folds, run_files, runs
from training.batch_size import find_batch_size
from training.config import Config, DataSettings
from training.device import held_by_others, pick_device
from training.distributed import World, world
from training.extra import labelled, open_extra
from training.failures import training_advice
from training.session import FitSummary, Session

log = logging.getLogger(__name__)


def fit(
    config: Config,
    store: Store | str | Path,
    fold: int,
    out: Path,
    resume: bool = False,
    command: str = "",
    console: Any = None,
) -> FitSummary:
    """Train on every fold but one, validate on that one, and write `out`/fold<K>.

    Args:
        config: the whole tree.
        store: a store, or its folder. Folds are made where it has none.
        fold: the fold to validate on.
        out: the run's folder.
        resume: continue where the folder stands; begin where there is none; do nothing where it is finished.
        command: the command line, for the record.
        console: what shows progress on the screen; see console.py.

    Raises:
        InputError: `out` is a file, an unknown fold, one without both classes in training or validation, or without any
            of a covariate.
        RunError: the folder is there and `resume` is not asked for, or it was begun with something else, or a loss, a
            gradient or a prediction was not finite.
        SystemExit: SIGTERM or Ctrl-C came; the run is saved and can be resumed. Status 128 + the signal's number.
    """
    store = store if isinstance(store, Store) else open_store(store)
    if Path(out).exists() and not Path(out).is_dir():
        raise InputError(f"{out}: a file, not a folder. Name another for the run with --out.")
    folder = Path(out) / f"fold{fold}"
    device = pick_device(config.train.device)
    with world(device) as place, training_advice(config):
        if not place.is_main:  # what every process would say, the first one says
            for package in ("training", "dali_pipes"):
                logging.getLogger(package).setLevel(logging.WARNING)
        if device.type == "cuda" and (held := held_by_others(device)):
            log.warning(
                "Other programs hold %.1f GiB of %s and will slow training down; CUDA_VISIBLE_DEVICES picks another.",
                held / 2**30,
                device,
            )
        training, held_out = split(store, config.data, fold, place)
        _require_covariates(config, held_out, store)
        config = _with_batch_size(config, folder, device, len(training) // place.size, place)
        # Every process looks before the first one writes.
        done = _look(folder, config, store, resume)
        place.barrier()
        if done is not None:
            log.info("%s is finished; nothing to do.", folder)
            return done
        log.info(
            "Fold %d: %d pictures to train on%s, %d of them with cancer; %d to validate on.",
            fold,
            len(training),
            f", {training['fold'].isna().sum()} from other stores" if config.data.extra_stores else "",
            (training["cancer"] == 1).sum(),
            len(held_out),
        )
        with Session(config, store, fold, folder, command, console, place, device, training, held_out) as session:
            return session.run()


def fit_folds(
    config: Config, store: Path, numbers: Sequence[int] | None, out: Path, *, resume: bool, console: Any
) -> Iterator[FitSummary]:
    """Train the folds named, or all of the store's, one after the other; yields each fold's summary as it ends."""
    opened = open_store(store)
    with world(pick_device(config.train.device)) as place:  # torchrun's processes meet once for all folds
        if numbers is None:
            if place.is_main:
                folds.read_or_make_folds(opened, config.data)
            place.barrier()
            numbers = sorted(folds.read_folds(opened)["fold"].unique())
        for fold in numbers:
            yield fit(config, opened, int(fold), out, resume=resume, command=shlex.join(sys.argv), console=console)


def split(store: Store, data: DataSettings, fold: int, place: World | None = None) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Rows to train on, `data.extra_stores`' among them, and to validate on, each with a fresh index; without label:
    none.

    Raises:
        InputError: the fold is unknown, either part lacks breasts with or without cancer, or a patient is in two of
            the stores.
        StoreError: a store of `data.extra_stores` is not there, or was converted otherwise.
    """
    place = place or World()
    if place.is_main:
        folds.read_or_make_folds(store, data)
    place.barrier()
    assigned = folds.read_folds(store)["fold"]
    there = sorted(assigned.unique().tolist())
    if fold not in there:
        raise InputError(f"--fold {fold}: the store {store.root} has folds {', '.join(map(str, there))}.")
    rows = store.manifest.assign(fold=assigned.to_numpy())
    stores = open_extra(store, data.extra_stores)
    others = labelled(stores) if stores else rows.iloc[:0]
    for name, column, wanted in (
        ("holdout_machines", "machine_id", data.holdout_machines),
        ("holdout_sites", "site_id", data.holdout_sites),
    ):
        known = sorted({*rows[column], *others[column]} - {""})
        if unknown := [each for each in wanted if each not in known]:
            raise InputError(f"data.{name}: {store.root} has no {unknown[0]!r}; it has {', '.join(known)}.")
    rows = rows[rows["cancer"].notna()]

    def kept(part: pd.DataFrame) -> pd.DataFrame:
        return part[~(part["machine_id"].isin(data.holdout_machines) | part["site_id"].isin(data.holdout_sites))]

    training, most = kept(rows[rows["fold"] != fold]), data.max_images
    if stores:  # of which a limit leaves some, too
        parts = _limit(training, most and (most + 1) // 2), _limit(kept(others), most and max(most // 2, 1))
        training = pd.concat(parts, ignore_index=True)
    training = _limit(training, most)
    held_out = _limit(rows[rows["fold"] == fold], data.max_images)
    for name, part in (("to train on", training), ("to validate on", held_out)):
        breasts = part.groupby("prediction_id")["cancer"].max()
        positives = int((breasts == 1).sum())
        if not 0 < positives < len(breasts):
            raise InputError(
                f"--fold {fold}: breasts with and without cancer are needed {name}; found {positives} with and "
                f"{len(breasts) - positives} without. Make other folds (folds --set data.folds=...) or bring more data."
            )
    return training, held_out


def _require_covariates(config: Config, held_out: pd.DataFrame, store: Store) -> None:
    """They are fitted after training; that they cannot be is said before."""
    for name in config.train.covariates:
        if held_out[name].isna().all():
            raise InputError(
                f"train.covariates: {name} is unknown for all pictures of {store.root} to validate on. Convert them "
                f"with a table that has the column {name}, or --set 'train.covariates=[]'."
            )


def _limit(rows: pd.DataFrame, most: int | None) -> pd.DataFrame:
    """At most so many rows, up to half of them positives, in the manifest's order."""
    if most is not None and len(rows) > most:
        positives = rows.index[rows["cancer"] == 1][: max(1, most // 2)]
        negatives = rows.index[rows["cancer"] == 0][: max(1, most - len(positives))]
        rows = rows.loc[np.sort(np.concatenate([positives, negatives]))]
    return rows.reset_index(drop=True)


def _with_batch_size(config: Config, folder: Path, device: torch.device, samples: int, place: World) -> Config:
    """The configuration with the batch that fits where `train.auto_batch` asks for it: found once, then kept."""
    if not config.train.auto_batch:
        return config
    if (folder / runs.CONFIG).is_file():
        size = runs.FoldRun(folder, 0).config.data.loader.batch_size
    else:
        size = find_batch_size(config, device, samples, place)
    loader = config.data.loader.model_copy(update={"batch_size": size})
    return config.model_copy(update={"data": config.data.model_copy(update={"loader": loader})})


def _look(folder: Path, config: Config, store: Store, resume: bool) -> FitSummary | None:
    """Whether the fold may be trained here; the summary where it has been already."""
    if not (folder / runs.CONFIG).is_file():
        return None
    if not resume:
        raise RunError(
            f"{folder}: a run is there already. Continue it with --resume, or name another folder with --out."
        )
    differences = runs.mismatch(folder, config, store)
    if differences:
        raise RunError(
            f"{folder}: it was begun with something else ({'; '.join(differences)}). Resume it with what it was begun "
            f"with (--config {folder / runs.CONFIG} --store ...), or name another folder with --out."
        )
    if not (folder / runs.SUMMARY).is_file():
        return None
    for name in (runs.BEST, runs.VALIDATION):
        if not (folder / name).is_file():
            raise RunError(
                f"{folder}: finished, but {name} is gone. Restore it, or train the fold again into another folder."
            )
    again = "Delete it, and --resume will recreate it."
    try:
        summary = replace(FitSummary(**run_files.read_json(folder / runs.SUMMARY, again)), folder=str(folder))
    except TypeError:
        raise RunError(f"{folder / runs.SUMMARY}: not what training writes there. {again}") from None
    return summary if summary.value is not None else replace(summary, value=math.nan)  # which JSON lacks
