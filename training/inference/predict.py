"""Prediction: a complete submission, whatever the pictures are like.

Every breast that the table asks for gets a row. What could not be predicted falls back on the breast's other pictures,
else on the share of cancers in training, and is listed. Files written, each atomically, the submission last:
    <out>                       prediction_id, cancer: one row a breast, in the table's order
    predictions_images.csv      one row a picture
    predictions_problems.csv    one row for each picture that needed a fallback, or that is in doubt
    predictions_settings.json   the models, weights, aggregation, calibration and threshold that made them
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from preprocessing import ingest
from preprocessing import table as tables
from preprocessing.errors import InputError
from preprocessing.manifest import open_store
from preprocessing.progress import Progress, Report
from preprocessing.settings import DecodeOn
from training import run_files
from training.failures import loading_advice, prediction_advice
from training.inference.assemble import (
    Aggregate,
    Weights,
    average,
    given_weights,
    open_ensemble,
    require_same_conversion,
)
from training.inference.calibration import Method
from training.inference.ensemble import Ensemble
from training.inference.intake import Chunk, from_store, levels_read, stream
from training.inference.partial import Part, Partial, unfinished, writing
from training.inference.submission import COVARIATES, FACTS, Results, asked_by_store, asked_by_table, compose, judge
from training.timing import Untimed, timed

log = logging.getLogger(__name__)

_PIXELS = "2"  # to be raised where the same file and settings come to other pixels

IMAGES = "predictions_images.csv"
PROBLEMS = "predictions_problems.csv"
SETTINGS = "predictions_settings.json"


@dataclass(frozen=True)
class PredictSummary:
    """What a prediction came to."""

    out: Path
    breasts: int
    images: int
    problems: int
    from_prior: int
    prior: float
    of_mean: dict[str, int]

    @property
    def exit_code(self) -> int:
        """0 where every picture was predicted, 3 where something fell back."""
        return 3 if self.problems else 0

    def __str__(self) -> str:
        text = f"Submission: {self.out}, {self.breasts} breasts from {self.images} pictures."
        if self.problems:
            text += (
                f" {self.problems} problems in {self.out.parent / PROBLEMS}; {self.from_prior} breasts without any "
                f"usable picture have the training share of cancers, {self.prior:.4f}."
            )
        for name, count in self.of_mean.items():
            text += f" {count} of the breasts count as of mean {name}: neither the table nor the files say theirs."
        return text


def predict(
    folders: Sequence[Path],
    out: Path,
    *,
    models: Sequence[Path] = (),
    store: Path | None = None,
    images: Path | None = None,
    csv: Path | None = None,
    device: str = "auto",
    tta: bool = False,
    all_windows: bool = False,
    weights: Weights = None,
    binary: bool = False,
    calibrate: Method = "none",
    aggregate: Aggregate = "run",
    covariates: Sequence[str] | None = None,
    columns: Sequence[str] = (),
    batch_size: int | None = None,
    workers: int = 0,
    decode_on: DecodeOn = "cpu",
    explain: Path | None = None,
    explain_threshold: float = 0.5,
    explain_method: Literal["attention", "gradcam"] = "attention",
    progress: Report | None = None,
    monitor: Any = None,
) -> PredictSummary:
    """Write a submission from runs and pictures.

    Args:
        folders: run folders, or single folds of them; their folds are averaged. Empty where `models` are given.
        out: the submission.
        models: instead of runs, exported ones (`model.onnx`), which are averaged; they need neither the runs nor timm.
        store: predict a store's pictures; with `csv`, those that it names, in its order.
        images: or predict a folder of raw pictures, as a stream; without `csv` ids and sides come from the files.
        csv: the pictures' table, one row a picture. Labels are not needed and not looked at.
        device: 'auto', 'cpu', 'cuda' or 'cuda:N'.
        tta: average each prediction with that of the mirror image.
        all_windows: average each prediction over the file's own windows instead of taking the first.
        weights: one a run, or 'fitted': those of the least log loss on the breasts that every run held out; equal ones
            without it.
        binary: write 1 at or above the threshold of the best pF1 on the runs' out-of-fold predictions, and 0 below it,
            instead of probabilities.
        calibrate: 'temperature', 'platt' or 'isotonic', fitted on the runs' out-of-fold predictions; an exported model
            brings its own.
        aggregate: from pictures to a breast, as `open_ensemble` takes it; an exported model brings its own.
        covariates: what the table says of the patient that a breast's probability takes into account, as
            `open_ensemble` takes `names`; an exported model brings its own.
        columns: how the columns of another data set's table are taken; see `csv_file.map_columns`.
        batch_size: pictures a batch, where those of the runs' validation do not fit here.
        workers: decoding processes of `images`, 0 for one a core. A stream that was cut short is taken up again where
            its last chunk ended.
        decode_on: where codestreams of `images` are decoded; see `ConvertSettings`.
        explain: folder for overlays of the pictures that reach `explain_threshold`; see `explain.py`.
        explain_threshold: of a picture's probability.
        explain_method: where the pooling looked, or what raised the probability.
        progress: told of the pictures done.
        monitor: times the wait for pictures, their transfer and the models; see monitor.py.

    Raises:
        InputError: neither or both of `store` and `images`, runs and a model at once, `explain` of a model, or a table
            that does not hold what it must.
        RunError: a run is missing, has a fold that has not finished its first epoch, or is damaged, or memory ran out
            or the GPU failed.
        StoreError: no store, or one that was converted otherwise than the runs' own.
    """
    if (store is None) == (images is None):
        raise InputError("predict takes either a store (--store) or a folder of pictures (--images).")
    _require_free(out, csv)
    if models:
        if folders:
            raise InputError("predict takes runs (--runs) or exported models (--model), not both.")
        chosen = calibrate != "none" or aggregate != "run" or covariates is not None
        _require_of_models(len(models), weights, binary, chosen, explain)
    listed = tables.read_table(csv, columns, labels=False) if csv is not None else None
    with ExitStack() as held:
        if store is not None:
            opened = open_store(store)
            ensemble = _open(folders, models, device, weights, calibrate, aggregate, covariates, batch_size)
            require_same_conversion(ensemble, opened)
            asked = asked_by_store(opened) if listed is None else asked_by_table(listed)
            held.enter_context(writing(out))
            kept, chunks = Partial(), nullcontext(iter([from_store(opened, listed)]))
        else:
            assert images is not None
            if not images.is_dir():
                raise InputError(f"{images}: no such folder of pictures. Give one with --images.")
            files = listed if listed is not None else tables.walk_folder(images)
            ensemble = _open(folders, models, device, weights, calibrate, aggregate, covariates, batch_size)
            asked = asked_by_table(files)
            drawn = (explain_threshold, explain_method, ensemble.weights.tolist())
            overlays = (str(explain.resolve()), *drawn) if explain is not None else None
            key = _key(ensemble, images, files, listed is not None, (tta, all_windows, overlays))
            kept = held.enter_context(unfinished(out, key))
            patched = [level for group in ensemble.groups if (level := group.pipeline.patch_level) is not None]
            levels = levels_read(ensemble.settings.levels, ensemble.longest_side, patched)
            settings = ensemble.settings.model_copy(update={"decode_on": decode_on})
            chunks = stream(images, files, listed is not None, settings, levels, ensemble.batch, kept.position, workers)
        after = None
        if explain is not None:
            after = partial(_explain, ensemble, out=explain, threshold=explain_threshold, method=explain_method)
        if binary and not math.isfinite(ensemble.threshold):
            raise InputError("--binary: no threshold was chosen: the runs' out-of-fold breasts are all of one class.")
        advice, averaged = prediction_advice(ensemble.largest_batch, ensemble.longest_side), (tta, all_windows)
        try:
            with advice, chunks as taken:
                results = _run(ensemble, taken, kept, len(asked), averaged, progress, after, monitor or Untimed())
        except (KeyboardInterrupt, SystemExit):
            if store is None and kept.position:
                log.warning("Stopped after %d pictures; the same command goes on from there.", kept.position)
            raise
        written = compose(ensemble, judge(asked, results, store is not None), results, binary)
        run_files.write_table(out.parent / IMAGES, written.pictures)
        run_files.write_table(out.parent / PROBLEMS, written.problems)
        made = {"mirror_averaged": tta, "windows_averaged": all_windows, "binary": binary}
        run_files.write_json(out.parent / SETTINGS, {**ensemble.describe(), **made})
        run_files.write_table(out, written.submission)
        kept.clear()
        return PredictSummary(
            out=out,
            breasts=len(written.submission),
            images=len(asked),
            problems=len(written.problems),
            from_prior=written.from_prior,
            prior=ensemble.prior,
            of_mean=written.of_mean,
        )


def _require_free(out: Path, csv: Path | None) -> None:
    """See that the submission, and what is written beside it, takes the place of nothing else."""
    if out.is_dir():
        raise InputError(f"{out}: a folder; name the file to write, such as {out / 'submission.csv'}.")
    if out.name in (IMAGES, PROBLEMS, SETTINGS):
        raise InputError(f"{out}: another file of this name is written beside the submission; give that another one.")
    names = {out.with_name(name).resolve() for name in (out.name, IMAGES, PROBLEMS, SETTINGS)}
    if csv is not None and csv.resolve() in names:
        raise InputError(f"{csv}: this is the pictures' table, and would be written over; take another --out.")


def _require_of_models(count: int, weights: Weights, binary: bool, chosen: bool, explain: Path | None) -> None:
    """Refuse what exported models cannot do; `chosen`: something that is chosen when a model is exported."""
    if isinstance(weights, str):
        raise InputError("--weights fitted needs the runs (--runs): exported models carry no out-of-fold predictions.")
    if count > 1 and binary:
        raise InputError("--binary: no threshold was chosen for the mean of several exported models; use their runs.")
    if chosen:
        raise InputError(
            "--calibrate, --aggregate and --covariates are chosen when a model is exported; leave them out here."
        )
    if explain is not None:
        raise InputError("--explain needs the runs (--runs): an exported model gives probabilities alone.")


def _open(
    folders: Sequence[Path],
    models: Sequence[Path],
    device: str,
    weights: Weights,
    calibrate: Method,
    aggregate: Aggregate,
    covariates: Sequence[str] | None,
    batch_size: int | None,
) -> Ensemble:
    with loading_advice():
        if not models:
            ensemble = open_ensemble(folders, device, weights, calibrate, aggregate, covariates)
        else:
            from training.inference.export import open_exported

            assert not isinstance(weights, str)
            opened = [open_exported(model, device) for model in models]
            if len(opened) == 1:
                given_weights(weights, 1)
            ensemble = average(opened, weights) if len(opened) > 1 else opened[0]
    # One size for all: chunks are whole batches of each, and three sizes may have a common multiple of thousands.
    return ensemble.in_batches(batch_size or min(group.loader.val_batch_size for group in ensemble.groups))


def _run(
    ensemble: Ensemble,
    chunks: Iterator[Chunk],
    kept: Partial,
    total: int,
    averaged: tuple[bool, bool],
    progress: Report | None,
    after: Callable[[Chunk, NDArray[np.float64]], object] | None,
    monitor: Any,
) -> Results:
    tta, all_windows = averaged
    done, rejected = kept.position, sum(len(part.failed) for part in kept.parts)

    def tell(more: int) -> None:
        nonlocal done
        done += more
        if progress and more:
            progress(Progress(done, total, rejected))

    for chunk in timed(chunks, monitor, "data"):
        failed = list(chunk.failed)
        rejected += len(failed)
        tell(len(failed))
        by_run, faults = np.zeros((0, len(ensemble.names))), {}
        if len(chunk.rows):
            by_run, faults = ensemble.predict(chunk.store, chunk.rows, tta, tell, monitor, all_windows)
            rejected += len(faults)
        if after and len(chunk.rows):
            after(chunk, by_run)
        failed += [(str(chunk.rows.at[row, "image_id"]), "damaged", why) for row, why in sorted(faults.items())]
        facts: list[Any] = chunk.rows[["image_id", *FACTS, *COVARIATES]].to_dict("records")
        kept.add(Part(chunk.position, facts, by_run.tolist(), [list(each) for each in failed]))
    parts = kept.parts
    by_run = [row for part in parts for row in part.by_run]
    known = pd.DataFrame([row for part in parts for row in part.facts], columns=["image_id", *FACTS, *COVARIATES])
    types = dict.fromkeys(["image_id", *FACTS], str) | dict.fromkeys(COVARIATES, np.float64)
    return Results(
        facts=known.astype(types),
        by_run=np.array(by_run, np.float64).reshape(len(by_run), len(ensemble.names)),
        failed=[(image, reason, detail) for part in parts for image, reason, detail in part.failed],
    )


def _key(ensemble: Ensemble, images: Path, files: pd.DataFrame, from_csv: bool, asked: tuple[Any, ...]) -> str:
    """Everything that a stream's predictions depend on, the files' sizes and times included; and the program, which has
    made other pixels of the same file in the past."""
    listing = files.to_csv(index=False) if from_csv else "\n".join(files["image_id"])
    settings = ensemble.settings.model_dump_json()
    groups = [
        f"{group.pipeline.model_dump_json()} {group.loader.val_batch_size} {ensemble.device} "
        + " ".join(f"{member.run} {member.sha256} {member.precision}" for member in group.members)
        for group in ensemble.groups
    ]
    found = [ingest.identity(images, source) for source in tables.sources(images, files, from_csv)]
    return "\n".join([_PIXELS, *groups, settings, str(images.resolve()), str(asked), listing, json.dumps(found)])


def _explain(
    ensemble: Ensemble,
    chunk: Chunk,
    by_run: NDArray[np.float64],
    *,
    out: Path,
    threshold: float,
    method: Literal["attention", "gradcam"],
) -> None:
    from training.inference import explain as explanation

    explanation.explain(ensemble, chunk.store, chunk.rows, by_run @ ensemble.weights, out, threshold, method)
