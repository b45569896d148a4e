"""Probabilities that mean what they say: fitted on breasts that the models did not see, applied to new ones.

The order of breasts, and so AUROC and (but for ties) pF1's best cut, stays; log loss and calibration error change.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray
from pydantic import BaseModel, ConfigDict, model_validator
from scipy.special import expit

from preprocessing.errors import RunError

Method = Literal["none", "temperature", "platt", "isotonic"]
_MARGIN = 1e-7  # probabilities are kept this far from 0 and 1, where logits are infinite
_TEMPERATURES = (0.02, 50.0)
_MOST_BIAS = 50.0


class Calibration(BaseModel):
    """A map of probabilities, as `model.json` keeps it.

    Attributes:
        method: 'none' leaves them alone; 'temperature' divides logits by a number (Guo et al. 2017, section 4.2), which
            leaves a half a half; 'platt' adds another to that (Platt 1999), as probabilities learnt from epochs with
            more cancers than there are need it; 'isotonic' is a rising step function, interpolated (Zadrozny & Elkan
            2002).
        temperature: above 1 draws probabilities towards a half.
        bias: added to the logits that were divided.
        x, y: the isotonic map's nodes.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    method: Method = "none"
    temperature: float = 1.0
    bias: float = 0.0
    x: tuple[float, ...] = ()
    y: tuple[float, ...] = ()

    @model_validator(mode="after")
    def _whole(self) -> Calibration:
        if self.temperature <= 0 or len(self.x) != len(self.y) or (self.method == "isotonic") != bool(self.x):
            raise ValueError("expected a temperature above 0, and as many y as x where the map is isotonic")
        return self

    def __call__(self, probabilities: ArrayLike) -> NDArray[np.float64]:
        """Calibrated probabilities, float64 in [0, 1], of such in [0, 1]; NaN stays."""
        given = np.asarray(probabilities, np.float64)
        if self.method in ("temperature", "platt"):
            return expit(logit(given) / self.temperature + self.bias)
        if self.method == "isotonic":
            return np.interp(given, self.x, self.y)
        return given


def fit(method: Method, labels: ArrayLike, probabilities: ArrayLike) -> Calibration:
    """The calibration of out-of-fold predictions.

    Args:
        method: see `Calibration`.
        labels: 0 or 1 of each breast.
        probabilities: in [0, 1], from models that did not learn from the breast.

    Raises:
        RunError: the breasts are all of one class, which nothing can be fitted on.
    """
    if method == "none":
        return Calibration()
    cancer, given = np.asarray(labels, np.float64), np.asarray(probabilities, np.float64)
    if len(np.unique(cancer)) < 2:
        raise RunError(
            f"--calibrate {method}: the runs' out-of-fold breasts are all of one class, so nothing can be fitted on "
            "them. Train on more patients, or leave it out."
        )
    if method == "isotonic":
        from sklearn.isotonic import IsotonicRegression

        fitted = IsotonicRegression(y_min=0, y_max=1, out_of_bounds="clip").fit(given, cancer)
        return Calibration(
            method=method, x=tuple(fitted.X_thresholds_.tolist()), y=tuple(fitted.y_thresholds_.tolist())
        )
    from scipy.optimize import minimize

    logits = logit(given)

    def loss(found: NDArray[np.float64]) -> tuple[float, NDArray[np.float64]]:
        slope, bias = found  # in which the mean log loss is convex
        scaled = logits * slope + bias
        error = (expit(scaled) - cancer) / len(cancer)
        return float(np.mean(np.logaddexp(0, scaled) - cancer * scaled)), np.array([error @ logits, error.sum()])

    steep, flat = (1 / temperature for temperature in _TEMPERATURES)
    most = _MOST_BIAS if method == "platt" else 0.0
    found = minimize(loss, [1.0, 0.0], jac=True, method="L-BFGS-B", bounds=[(flat, steep), (-most, most)])
    slope, bias = map(float, found.x)
    return Calibration(method=method, temperature=1 / slope, bias=bias)


def logit(probabilities: ArrayLike) -> NDArray[np.float64]:
    """Finite logits of probabilities in [0, 1], which are kept a little way from 0 and 1; NaN stays."""
    kept = np.clip(np.asarray(probabilities, np.float64), _MARGIN, 1 - _MARGIN)
    return np.log(kept) - np.log1p(-kept)
