"""From predicted pictures to a submission: what was asked for, what came of it, and what stands in for the rest."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from preprocessing import table as tables
from preprocessing.manifest import REJECTED_FACTS, Store
from training.inference.covariates import NAMES as COVARIATES
from training.inference.ensemble import Ensemble

PROBLEM_COLUMNS = ("prediction_id", "image_id", "reason", "detail", "fallback")
FACTS = ("patient_id", "laterality", "view", "prediction_id")


@dataclass(frozen=True)
class Results:
    """What the models and the files gave.

    Attributes:
        facts: `image_id`, `FACTS` and `COVARIATES` of each picture that could be read.
        by_run: its probabilities, float64 [pictures, runs].
        failed: (image_id, reason, detail) of those without prediction; a picture may be in both, and then has none.
    """

    facts: pd.DataFrame
    by_run: NDArray[np.float64]
    failed: list[tuple[str, str, str]]


@dataclass(frozen=True)
class Tables:
    """What is written.

    Attributes:
        submission: prediction_id, cancer; one row a breast asked for.
        pictures: image_id, `FACTS`, prediction (NaN where there is none); one row a picture asked for.
        problems: `PROBLEM_COLUMNS`.
        from_prior: breasts without any usable picture.
        of_mean: names of covariates, and the breasts for which one was unknown and the mean stood in.
    """

    submission: pd.DataFrame
    pictures: pd.DataFrame
    problems: pd.DataFrame
    from_prior: int
    of_mean: dict[str, int]


def asked_by_table(listed: pd.DataFrame) -> pd.DataFrame:
    """Each picture that a table names, in its order, with what the table says of it; empty text where nothing."""
    rows: list[dict[str, str]] = [
        dict(zip(listed.columns, map(str, cells), strict=True)) for cells in listed.to_numpy()
    ]
    facts = {name: [tables.text(row, name) for row in rows] for name in FACTS}
    facts["laterality"] = [tables.laterality(row) for row in rows]
    asked = pd.DataFrame({"image_id": [row["image_id"] for row in rows], **facts}, dtype=str)
    return asked.assign(**{name: [tables.number(row, name) for row in rows] for name in COVARIATES})


def asked_by_store(store: Store) -> pd.DataFrame:
    """Each picture of a store, then those that it rejected, with what its CSV said of them."""
    rejected = store.rejected[list(REJECTED_FACTS)]
    asked = pd.concat([store.manifest[["image_id", *FACTS, *COVARIATES]], rejected], ignore_index=True)
    texts = ["image_id", *FACTS]
    return asked.assign(**{name: asked[name].fillna("").astype(str) for name in texts})


def judge(asked: pd.DataFrame, results: Results, from_store: bool) -> pd.DataFrame:
    """The pictures asked for, in their order, with `row` (position in the results, -1 without prediction), `reason` and
    `detail` (why), and what the files themselves say where the table said nothing."""
    failed = {image: (reason, detail) for image, reason, detail in results.failed}
    rows = {image: row for row, image in enumerate(results.facts["image_id"]) if image not in failed}
    absent = ("absent", "the store has no such picture" if from_store else "never came back from decoding")
    why = [("", "") if image in rows else failed.get(image, absent) for image in asked["image_id"]]
    known = results.facts.drop_duplicates("image_id").set_index("image_id").reindex(asked["image_id"])
    judged = asked.assign(row=[rows.get(image, -1) for image in asked["image_id"]])
    judged[["reason", "detail"]] = pd.DataFrame(why, index=judged.index, columns=["reason", "detail"], dtype=str)
    for name in ("patient_id", "laterality", "view"):
        judged[name] = judged[name].where(judged[name] != "", known[name].fillna("").to_numpy())
    for name in COVARIATES:
        judged[name] = judged[name].fillna(pd.Series(known[name].to_numpy(np.float64), judged.index))
    made = judged["patient_id"] + "_" + judged["laterality"]
    judged["sure"] = (judged["prediction_id"] != "") | ((judged["patient_id"] != "") & (judged["laterality"] != ""))
    judged["prediction_id"] = judged["prediction_id"].where(judged["prediction_id"] != "", made)
    return judged


def compose(ensemble: Ensemble, judged: pd.DataFrame, results: Results, binary: bool = False) -> Tables:
    """The tables to write, from what `judge` gave.

    Every breast that is asked for gets a probability in [0, 1], or, where `binary`, 0 or 1 by the ensemble's threshold.
    """
    nameless = judged["prediction_id"] == "_"  # neither patient nor side is known: no breast was asked for
    judged = judged.assign(prediction_id=judged["prediction_id"].mask(nameless, ""))
    usable = judged[(judged["row"] >= 0) & ~nameless]
    by_run = results.by_run[usable["row"].to_numpy(np.int64)]
    breasts = ensemble.combine(usable, by_run)
    wanted = judged.loc[~nameless, "prediction_id"].drop_duplicates()
    submission = pd.DataFrame({"prediction_id": wanted, "cancer": breasts.reindex(wanted).to_numpy(np.float64)})
    without = submission["cancer"].isna()
    submission = submission.fillna({"cancer": ensemble.prior})
    if binary:
        submission["cancer"] = (submission["cancer"] >= ensemble.threshold).astype(int)
    pictures = judged[["image_id", *FACTS]].assign(prediction=np.nan)
    pictures.loc[usable.index, "prediction"] = by_run @ ensemble.weights
    return Tables(
        submission=submission,
        pictures=pictures,
        problems=_problems(judged, set(breasts.index)),
        from_prior=int(without.sum()),
        of_mean={name: count for name in ensemble.taken if (count := _unknown(usable, name))},
    )


def _unknown(pictures: pd.DataFrame, covariate: str) -> int:
    """Breasts for which no picture says it."""
    return int(pictures.groupby("prediction_id")[covariate].first().isna().sum())


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
