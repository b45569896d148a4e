"""Does it learn? Trains folds of a store within a stated budget and prints AUROC per breast, with intervals, by fold.

    python benchmarks/learning.py --store STORE [--config rsna-subset] [--fold 0]... [--minutes 45] [--json FILE]
    python benchmarks/learning.py --synthetic 60 --config small-cpu --fold 0     easy data, made on the spot
    python benchmarks/learning.py --store STORE --shuffle-labels                  must come out near 0.5: no leak
    python benchmarks/learning.py --store STORE --out RUN --judge                 a run that was trained before

The epochs are as many as fit the budget, by a short trial first, and at most those of the configuration.
"""

from __future__ import annotations

import math
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import click
import numpy as np
import pandas as pd

from preprocessing.convert import convert
from preprocessing.manifest import Store, open_store
from preprocessing.settings import ConvertSettings
from preprocessing.synth import synthesize
from training import fit, metrics, run_files, runs
from training.config import Config, load_config
from training.console import Console
from training.evaluation import evaluate, intervals
from training.folds import read_or_make_folds
from training.inference.assemble import open_ensemble
from training.inference.covariates import parse_names

TRIAL_STEPS = 8


def epochs_that_fit(config: Config, store: Store, fold: int, minutes: float, folder: Path) -> int:
    """Epochs that a fold can be trained for in so many minutes, by a trial of a few steps and one validation."""
    trial = config.model_copy(update={"train": config.train.model_copy(update={"epochs": 1, "max_steps": TRIAL_STEPS})})
    begun = time.monotonic()
    fit.fit(trial, store, fold, folder)
    start_up = time.monotonic() - begun
    (record,) = runs.open_run(folder).folds[0].records("epoch")
    batch = config.data.loader.batch_size
    training = record["step"] * config.train.accumulate * batch / record["images_per_s"]
    validation = record["seconds"] - training
    samples = config.data.loader.epoch_samples or len(fit.split(store, config.data, fold)[0])
    epoch = samples / record["images_per_s"] + validation
    left = 60 * minutes - (start_up - record["seconds"])
    return max(1, min(config.train.epochs, int(left / epoch)))


def shuffled(store: Store, folder: Path, seed: int = 0) -> Store:
    """The store with its patients' labels dealt out anew: pictures of a patient keep together, labels mean nothing."""
    folder.mkdir(parents=True)
    shutil.copy(store.root / "store.json", folder)
    (folder / "tiles").symlink_to((store.root / "tiles").resolve())
    rows = store.manifest
    sick = rows.groupby("patient_id")["cancer"].max()
    dealt = dict(zip(sick.index, np.random.default_rng(seed).permutation(sick.to_numpy()), strict=True))
    rows.assign(cancer=rows["patient_id"].map(dealt).astype("float32")).to_parquet(folder / "manifest.parquet")
    return open_store(folder)


def mirrored(run: runs.Run, store: Store) -> pd.DataFrame:
    """The out-of-fold predictions as `predict --tta` makes them: each fold's own pictures by its own model again,
    averaged with those of their mirror images."""
    parts = []
    for fold in run.folds:
        ensemble = open_ensemble([fold.folder])
        held_out = fold.validation.set_index("image_id")
        rows = store.manifest[store.manifest["image_id"].isin(held_out.index)].reset_index(drop=True)
        predictions, _ = ensemble.predict(store, rows, tta=True)
        parts.append(held_out.loc[rows["image_id"]].assign(prediction=predictions[:, 0]).reset_index())
    return pd.concat(parts, ignore_index=True)


def judge(
    run: runs.Run, frame: pd.DataFrame, seconds: dict[int, float], names: tuple[str, ...] | None = None
) -> dict[str, Any]:
    """Figures of the run: by fold with its own interval, over all folds, and by machine."""
    result, judged = evaluate.judge(run, frame, names=names)
    rows: list[dict[str, Any]] = []
    for fold in run.folds:
        breasts = judged[judged["fold"] == fold.fold]
        alone = breasts["pictures" if "pictures" in breasts else "prediction"]
        figures = metrics.summarise(breasts["cancer"], breasts["prediction"])
        rows.append(
            {
                "fold": fold.fold,
                "auroc": figures["auroc"],
                "interval": intervals.bootstrap(breasts)["auroc"],
                "pictures_alone": metrics.summarise(breasts["cancer"], alone)["auroc"],
                "last_epoch_auroc": fold.records("epoch")[-1]["auroc"],  # not chosen by its own value
                "breasts": figures["count"],
                "positives": figures["positives"],
                "minutes": seconds.get(fold.fold, float("nan")) / 60,
            }
        )
    machines = [part for part in result["subgroups"] if part["group"] == "machine_id"]
    return {
        "folds": rows,
        "mean_last_epoch_auroc": float(np.mean([row["last_epoch_auroc"] for row in rows])),
        "mean_auroc": result["mean_of_folds"]["auroc"],
        "mean_auroc_of_pictures_alone": float(np.mean([row["pictures_alone"] for row in rows])),
        "covariates": result["covariates"],
        "pooled_auroc": result["breast"]["auroc"],
        "pooled_interval": result["breast"]["intervals"]["auroc"],
        "machines": [
            {name: part[name] for name in ("value", "count", "positives", "auroc", "average_precision")}
            for part in machines
        ],
    }


@click.command()
@click.option("--store", type=click.Path(path_type=Path), default=None, help="The store to learn from.")
@click.option("--synthetic", type=int, default=None, help="Make an easy data set of so many patients instead.")
@click.option("--config", "source", default="rsna-subset", show_default=True, help="A preset's name or a YAML file.")
@click.option("--set", "overrides", multiple=True, metavar="A.B=C", help="Override one setting; repeatable.")
@click.option("--fold", "folds", type=int, multiple=True, help="Folds to train; repeatable.  [default: all]")
@click.option("--minutes", type=float, default=45.0, show_default=True, help="Budget of a fold.")
@click.option("--shuffle-labels", is_flag=True, help="Deal the labels out anew over the patients first.")
@click.option("--out", type=click.Path(path_type=Path), default=None, help="Keep the run there.")
@click.option("--judge", "only_judge", is_flag=True, help="Train nothing: judge the run that is in --out already.")
@click.option("--tta", is_flag=True, help="Judge what `predict --tta` gives: mirror images averaged in.")
@click.option("--covariates", default=None, metavar="age,...|none", help="As in `evaluate`.")
@click.option("--json", "result_file", type=click.Path(path_type=Path), default=None, help="Write the figures there.")
def main(
    store: Path | None,
    synthetic: int | None,
    source: str,
    overrides: tuple[str, ...],
    folds: tuple[int, ...],
    minutes: float,
    shuffle_labels: bool,
    out: Path | None,
    only_judge: bool,
    tta: bool,
    covariates: str | None,
    result_file: Path | None,
) -> None:
    """Train and print."""
    if only_judge and out is None:
        raise click.UsageError("--judge needs the run's folder: give --out")
    config = load_config(source, overrides)
    with tempfile.TemporaryDirectory() as temporary, Console(directory=out) as console:
        scratch = Path(temporary)
        opened = _store(store, synthetic, config, scratch)
        if shuffle_labels:
            opened = shuffled(opened, scratch / "shuffled")
        numbers = folds or tuple(sorted(int(f) for f in read_or_make_folds(opened, config.data)["fold"].unique()))
        folder = out or scratch / "run"
        seconds = {}
        if not only_judge:
            epochs = epochs_that_fit(config, opened, numbers[0], minutes, scratch / "trial")
            console.print(f"{epochs} epochs fit into {minutes:g} minutes a fold.")
            seconds = _train(config, epochs, opened, numbers, folder, console)
        run = runs.open_run(folder)
        frame = mirrored(run, opened) if tta else evaluate.out_of_fold(run)
        found = {
            "config": source,
            "epochs": run.folds[0].config.train.epochs,
            "minutes": minutes,
            "tta": tta,
            **judge(run, frame, seconds, parse_names(covariates)),
        }
        console.table("AUROC per breast, by fold", [_shown(row) for row in found["folds"]])
        console.table("AUROC per breast, by machine", [_machine(row) for row in found["machines"]])
        low, high = found["pooled_interval"] or (float("nan"), float("nan"))
        pooled = f"{found['pooled_auroc']:.4f} ({low:.4f} to {high:.4f})"
        click.echo(f"Mean of folds {found['mean_auroc']:.4f}; pooled {pooled}")
        if found["covariates"]:
            alone = found["mean_auroc_of_pictures_alone"]
            click.echo(f"With {', '.join(found['covariates'])}; from pictures alone the mean of folds is {alone:.4f}")
    if result_file:
        run_files.write_json(result_file, found)


def _train(
    config: Config, epochs: int, store: Store, numbers: tuple[int, ...], folder: Path, console: Console
) -> dict[int, float]:
    """Seconds that each fold took."""
    config = config.model_copy(update={"train": config.train.model_copy(update={"epochs": epochs})})
    seconds = {}
    for fold in numbers:
        begun = time.monotonic()
        console.print(str(fit.fit(config, store, fold, folder, console=console)))
        seconds[fold] = time.monotonic() - begun
    return seconds


def _store(store: Path | None, synthetic: int | None, config: Config, scratch: Path) -> Store:
    if store is not None:
        return open_store(store)
    if synthetic is None:
        raise click.UsageError("give --store, or --synthetic with a number of patients")
    synthesize(scratch / "data", patients=synthetic, contrast=1.5)
    largest = max(config.pipeline.height, config.pipeline.width, 256)
    settings = ConvertSettings(levels=("full", str(largest)))
    convert(scratch / "data" / "train_images", scratch / "data" / "train.csv", scratch / "store", settings)
    return open_store(scratch / "store")


def _shown(row: dict[str, Any]) -> dict[str, str]:
    low, high = row["interval"] or (float("nan"), float("nan"))
    return {
        "fold": str(row["fold"]),
        "AUROC": f"{row['auroc']:.3f}",
        "95 % interval": f"{low:.3f} to {high:.3f}",
        "pictures": f"{row['pictures_alone']:.3f}",
        "last epoch": f"{row['last_epoch_auroc']:.3f}",
        "breasts": str(row["breasts"]),
        "cancer": str(row["positives"]),
        "minutes": "" if math.isnan(row["minutes"]) else f"{row['minutes']:.1f}",
    }


def _machine(row: dict[str, Any]) -> dict[str, str]:
    auroc = "n/a" if row["auroc"] is None else f"{row['auroc']:.4f}"
    counts = {"breasts": str(row["count"]), "with cancer": str(row["positives"])}
    return {"machine": row["value"] or "unknown", "AUROC": auroc, **counts}


if __name__ == "__main__":
    main()
