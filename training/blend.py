"""How much each run of an ensemble counts, and how its pictures become a breast: fitted on breasts that no model learnt
from."""

from __future__ import annotations

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray

from preprocessing.errors import RunError
from training import metrics
from training.calibration import logit

_PEAKED = 50.0  # an exponent that is as good as the maximum
_MARGIN = 1e-7  # mixtures are kept this far from 0 and 1, where the loss is infinite


def fit_weights(labels: ArrayLike, predictions: ArrayLike) -> NDArray[np.float64]:
    """The convex mixture of the runs with the least mean log loss (linear opinion pool, Stone 1961); convex in the
    weights, so that there is no other minimum to end in.

    Args:
        labels: 0 or 1 of each breast, [breasts].
        predictions: probabilities, [breasts, runs], each from models that did not learn from the breast.

    Returns:
        float64 [runs], 0 or more, summing to 1.

    Raises:
        RunError: no breast was held out by every run, or those are all of one class.
    """
    cancer, given = np.asarray(labels, np.float64), np.asarray(predictions, np.float64)
    if len(np.unique(cancer)) < 2:
        raise RunError(
            f"--weights fitted: {len(cancer)} breasts were held out by every run, and it takes some with and some "
            "without cancer. Give the runs folds of the same patients, or numbers such as --weights 2,1."
        )
    count = given.shape[1]
    if count == 1:
        return np.ones(1)
    from scipy.optimize import minimize

    def loss(weights: NDArray[np.float64]) -> tuple[float, NDArray[np.float64]]:
        mixed = np.clip(given @ weights, _MARGIN, 1 - _MARGIN)
        slope = (mixed - cancer) / (mixed * (1 - mixed))
        return -float(np.mean(cancer * np.log(mixed) + (1 - cancer) * np.log1p(-mixed))), given.T @ slope / len(cancer)

    found = minimize(
        loss,
        np.full(count, 1 / count),
        jac=True,
        method="SLSQP",
        bounds=[(0, 1)] * count,
        constraints={"type": "eq", "fun": lambda weights: weights.sum() - 1, "jac": lambda weights: np.ones(count)},
    )
    weights = np.clip(found.x, 0, 1)
    return weights / weights.sum()


def fit_aggregate(pictures: pd.DataFrame) -> str:
    """The generalised mean that tells breasts with cancer best from those without, as `metrics` names it.

    Its exponent has the least log loss after a logistic recalibration (Platt 1999): what is fitted is how pictures are
    weighed against each other, not how sure the outcome is.

    Args:
        pictures: `prediction_id`, `cancer` and `prediction` of each, from models that did not learn from it.

    Raises:
        RunError: the breasts are all of one class.
    """
    from scipy.optimize import minimize_scalar
    from sklearn.linear_model import LogisticRegression

    known = pictures.dropna(subset=["cancer", "prediction"])
    labels = known.groupby("prediction_id")["cancer"].max().to_numpy(np.float64)
    if len(np.unique(labels)) < 2:
        raise RunError(
            "--aggregate fitted: the run's out-of-fold breasts are all of one class, so nothing can be fitted on them. "
            "Train on more patients, or choose mean, max or noisy_or."
        )

    def loss(log_exponent: float) -> float:
        breasts = metrics.aggregate_predictions(
            known["prediction"], known["prediction_id"], f"power:{np.exp(log_exponent)}"
        )
        logits = logit(breasts)[:, None]
        fitted = LogisticRegression(C=1e6).fit(logits, labels).predict_proba(logits)[:, 1]
        return metrics.log_loss(labels, fitted)

    found = minimize_scalar(loss, bounds=(0.0, float(np.log(_PEAKED))), method="bounded")
    return f"power:{np.exp(found.x):.3f}"  # pyright: ignore[reportAttributeAccessIssue]
