"""Prediction: a complete submission, whatever the pictures are like.

Every breast that the table asks for gets a row. What could not be predicted falls back on the breast's other pictures,
else on the share of cancers in training, and is listed. Files written, each atomically, the submission last:
    <out>                       prediction_id, cancer: one row a breast, in the table's order
    predictions_images.csv      one row a picture
    predictions_problems.csv    one row for each picture that needed a fallback, or that is in doubt
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from preprocessing import table as tables
from preprocessing.errors import InputError
from preprocessing.manifest import Store, open_store
from preprocessing.progress import Progress, Report
from training import runs
from training.ensemble import Ensemble, open_ensemble, require_same_conversion
from training.intake import Chunk, from_store, narrowed, stream

IMAGES = "predictions_images.csv"
PROBLEMS = "predictions_problems.csv"
PROBLEM_COLUMNS = ("prediction_id", "image_id", "reason", "detail", "fallback")
_FACTS = ("patient_id", "laterality", "view", "prediction_id")


@dataclass(frozen=True)
class PredictSummary:
    """What a prediction came to."""

    out: Path
    breasts: int
    images: int
    problems: int
    from_prior: int
    prior: float

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
        return text


def predict(
    folders: Sequence[Path],
    out: Path,
    *,
    store: Path | None = None,
    images: Path | None = None,
    csv: Path | None = None,
    device: str = "auto",
    tta: bool = False,
    weights: Sequence[float] | None = None,
    workers: int = 0,
    explain: Path | None = None,
    explain_threshold: float = 0.5,
    explain_method: Literal["attention", "gradcam"] = "attention",
    progress: Report | None = None,
) -> PredictSummary:
    """Write a submission from runs and pictures.

    Args:
        folders: run folders, or single folds of them; their folds are averaged.
        out: the submission.
        store: predict a store's pictures; with `csv`, those that it names, in its order.
        images: or predict a folder of raw pictures, as a stream; without `csv` ids and sides come from the files.
        csv: the pictures' table, one row a picture. Labels are not needed and not looked at.
        device: 'auto', 'cpu', 'cuda' or 'cuda:N'.
        tta: average each prediction with that of the mirror image.
        weights: one a run; equal ones without it.
        workers: decoding processes of `images`, 0 for one a core.
        explain: folder for overlays of the pictures that reach `explain_threshold`; see `explain.py`.
        explain_threshold: of a picture's probability.
        explain_method: where the pooling looked, or what raised the probability.
        progress: told of the pictures done.

    Raises:
        InputError: neither or both of `store` and `images`, or a table that does not hold what it must.
        RunError: a run is missing, unfinished or damaged.
        StoreError: no store, or one that was converted otherwise than the runs' own.
    """
    if (store is None) == (images is None):
        raise InputError("predict takes either a store (--store) or a folder of pictures (--images).")
    listed = tables.read_table(csv) if csv is not None else None
    opened = open_store(store) if store is not None else None
    files = listed
    if images is not None and listed is None:
        if not images.is_dir():
            raise InputError(f"{images}: no such folder of pictures. Give one with --images.")
        files = tables.walk_folder(images)
    ensemble = open_ensemble(folders, device, weights)
    if opened is not None:
        require_same_conversion(ensemble, opened)
        chunks: AbstractContextManager[Iterator[Chunk]] = nullcontext(iter([from_store(opened, listed)]))
    else:
        assert images is not None
        assert files is not None
        settings = narrowed(ensemble.settings, ensemble.longest_side)
        chunks = stream(images, files, listed is not None, settings, ensemble.batch, workers)
    asked = _asked_by_store(opened) if opened is not None and listed is None else _asked_by_table(files)
    after = None
    if explain is not None:
        after = partial(_explain, ensemble, out=explain, threshold=explain_threshold, method=explain_method)
    with chunks as taken:
        results = _run(ensemble, taken, len(asked), tta, progress, after)
    return _write(ensemble, _judged(asked, results, opened is not None), results, out)


@dataclass
class _Results:
    """What the chunks came to.

    Attributes:
        facts: image_id and `_FACTS` of each picture that could be read.
        by_run: its probabilities, float64 [pictures, runs], NaN where there are none.
        failed: (image_id, reason, detail) of the others.
    """

    facts: pd.DataFrame
    by_run: NDArray[np.float64]
    failed: list[tuple[str, str, str]]


def _run(
    ensemble: Ensemble,
    chunks: Iterator[Chunk],
    total: int,
    tta: bool,
    progress: Report | None,
    after: Callable[[Chunk, NDArray[np.float64]], object] | None,
) -> _Results:
    facts, by_run, failed = [], [np.zeros((0, len(ensemble.names)))], []
    done = 0

    def tell(more: int) -> None:
        nonlocal done
        done += more
        if progress and more:
            progress(Progress(done, total, len(failed)))

    for chunk in chunks:
        failed += chunk.failed
        tell(len(chunk.failed))
        if len(chunk.rows):
            predictions, faults = ensemble.predict(chunk.store, chunk.rows, tta, tell)
            failed += [(chunk.rows.at[row, "image_id"], "damaged", why) for row, why in sorted(faults.items())]
            by_run.append(predictions)
            facts.append(chunk.rows[["image_id", *_FACTS]])
            if after:
                after(chunk, by_run[-1])
    columns = pd.DataFrame(columns=["image_id", *_FACTS], dtype=str)
    return _Results(pd.concat(facts, ignore_index=True) if facts else columns, np.concatenate(by_run), failed)


def _explain(
    ensemble: Ensemble,
    chunk: Chunk,
    by_run: NDArray[np.float64],
    *,
    out: Path,
    threshold: float,
    method: Literal["attention", "gradcam"],
) -> None:
    from training import explain as explanation

    explanation.explain(ensemble, chunk.store, chunk.rows, by_run @ ensemble.weights, out, threshold, method)


def _asked_by_table(listed: pd.DataFrame | None) -> pd.DataFrame:
    """Each picture that a table names, in its order, with what the table says of it; empty text where nothing."""
    assert listed is not None
    rows: list[dict[str, str]] = [
        dict(zip(listed.columns, map(str, cells), strict=True)) for cells in listed.to_numpy()
    ]
    facts = {name: [tables.text(row, name) for row in rows] for name in _FACTS}
    facts["laterality"] = [tables.laterality(row) for row in rows]
    return pd.DataFrame({"image_id": [row["image_id"] for row in rows], **facts}, dtype=str)


def _asked_by_store(store: Store) -> pd.DataFrame:
    """Each picture of a store, then those that it rejected, of which only the patient is known."""
    rejected = store.rejected[["image_id", "patient_id"]]
    asked = pd.concat([store.manifest[["image_id", *_FACTS]], rejected], ignore_index=True)
    return asked.fillna("").astype(str)


def _judged(asked: pd.DataFrame, results: _Results, from_store: bool) -> pd.DataFrame:
    """The pictures asked for, in their order, with `row` (position in the results, -1 without prediction), `reason` and
    `detail` (why), and what the files themselves say where the table said nothing."""
    failed = {image: (reason, detail) for image, reason, detail in results.failed}
    rows = {image: row for row, image in enumerate(results.facts["image_id"]) if image not in failed}
    absent = ("absent", "the store has no such picture" if from_store else "never came back from decoding")
    why = [("", "") if image in rows else failed.get(image, absent) for image in asked["image_id"]]
    known = results.facts.drop_duplicates("image_id").set_index("image_id").reindex(asked["image_id"]).fillna("")
    judged = asked.assign(row=[rows.get(image, -1) for image in asked["image_id"]])
    judged[["reason", "detail"]] = pd.DataFrame(why, index=judged.index, columns=["reason", "detail"], dtype=str)
    for name in ("patient_id", "laterality", "view"):
        judged[name] = judged[name].where(judged[name] != "", known[name].to_numpy())
    made = judged["patient_id"] + "_" + judged["laterality"]
    judged["sure"] = (judged["prediction_id"] != "") | ((judged["patient_id"] != "") & (judged["laterality"] != ""))
    judged["prediction_id"] = judged["prediction_id"].where(judged["prediction_id"] != "", made)
    return judged


def _write(ensemble: Ensemble, judged: pd.DataFrame, results: _Results, out: Path) -> PredictSummary:
    nameless = judged["prediction_id"] == "_"  # neither patient nor side: no breast was asked for
    judged.loc[nameless, "prediction_id"] = ""
    usable = judged[(judged["row"] >= 0) & ~nameless]
    by_run = results.by_run[usable["row"].to_numpy(np.int64)]
    breasts = ensemble.combine(usable, by_run)
    wanted = judged.loc[~nameless, "prediction_id"].drop_duplicates()
    submission = pd.DataFrame({"prediction_id": wanted, "cancer": breasts.reindex(wanted).to_numpy(np.float64)})
    from_prior = submission["cancer"].isna()
    submission["cancer"] = submission["cancer"].fillna(ensemble.prior)
    pictures = judged[["image_id", *_FACTS]].assign(prediction=np.nan)
    pictures.loc[usable.index, "prediction"] = by_run @ ensemble.weights
    problems = _problems(judged, set(breasts.index))
    out.parent.mkdir(parents=True, exist_ok=True)
    runs.write_table(out.parent / IMAGES, pictures)
    runs.write_table(out.parent / PROBLEMS, problems)
    runs.write_table(out, submission)
    return PredictSummary(
        out=out,
        breasts=len(submission),
        images=len(judged),
        problems=len(problems),
        from_prior=int(from_prior.sum()),
        prior=ensemble.prior,
    )


def _problems(judged: pd.DataFrame, predicted: set[str]) -> pd.DataFrame:
    """Pictures that were not predicted, breasts that are not named, and ids that name several breasts."""
    lost = judged[judged["reason"] != ""]
    fallback = ["" if not each else "other views" if each in predicted else "prior" for each in lost["prediction_id"]]
    unsure = judged[~judged["sure"] & (judged["reason"] == "")].assign(
        reason="laterality", detail="neither the table nor the file says which breast it shows", fallback=""
    )
    named = judged[(judged["patient_id"] != "") & (judged["laterality"] != "") & (judged["prediction_id"] != "")]
    breasts = (named["patient_id"] + "_" + named["laterality"]).groupby(named["prediction_id"]).nunique()
    several = named[named["prediction_id"].isin(breasts.index[breasts > 1])].assign(
        reason="id", detail="this prediction_id is given to several breasts", fallback=""
    )
    found = pd.concat([lost.assign(fallback=fallback), unsure, several])
    return found.sort_index(kind="stable")[list(PROBLEM_COLUMNS)]
