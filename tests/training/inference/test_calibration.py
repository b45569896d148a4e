"""Calibration against closed forms and scikit-learn, and through a prediction."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from sklearn.isotonic import IsotonicRegression
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss, roc_auc_score

from preprocessing.errors import RunError
from tests.training.untrained import make_run
from training.inference.assemble import open_ensemble
from training.inference.calibration import Calibration, fit


def _drawn(temperature: float, count: int = 20_000) -> tuple[np.ndarray, np.ndarray]:
    """Labels drawn with probability sigmoid(logit), and predictions that are too sure by `temperature`."""
    rng = np.random.default_rng(0)
    logits = rng.normal(-1, 1.5, count)
    labels = (rng.random(count) < 1 / (1 + np.exp(-logits))).astype(float)
    return labels, 1 / (1 + np.exp(-logits * temperature))


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_the_temperature_of_too_sure_predictions_is_found(temperature: float):
    labels, predictions = _drawn(temperature)
    found = fit("temperature", labels, predictions)
    assert found.temperature == pytest.approx(temperature, rel=0.05)
    calibrated = found(predictions)
    assert log_loss(labels, calibrated) <= log_loss(labels, predictions) + 1e-9
    assert roc_auc_score(labels, calibrated) == pytest.approx(roc_auc_score(labels, predictions), abs=1e-9)


def test_platt_undoes_both_what_balanced_epochs_did_to_the_prior_and_too_much_certainty():
    rng = np.random.default_rng(0)
    logits = rng.normal(-4.5, 1.5, 50_000)
    labels = (rng.random(50_000) < 1 / (1 + np.exp(-logits))).astype(float)
    predictions = 1 / (1 + np.exp(-(logits + 3.9) * 2))  # as of epochs with as many positives as negatives
    found = fit("platt", labels, predictions)
    reference = LogisticRegression(C=1e9).fit(np.log(predictions / (1 - predictions))[:, None], labels)
    assert 1 / found.temperature == pytest.approx(reference.coef_.item(), rel=0.01)
    assert found.bias == pytest.approx(reference.intercept_.item(), rel=0.01)
    assert found(predictions).mean() == pytest.approx(labels.mean(), rel=0.01)
    assert fit("temperature", labels, predictions)(predictions).mean() > 5 * labels.mean()


def test_isotonic_is_that_of_scikit_learn():
    labels, predictions = _drawn(3.0, 500)
    found = fit("isotonic", labels, predictions)
    reference = IsotonicRegression(y_min=0, y_max=1, out_of_bounds="clip").fit(predictions, labels)
    asked = np.linspace(0, 1, 101)
    np.testing.assert_allclose(found(asked), reference.predict(asked), atol=1e-12)
    assert (np.diff(found(asked)) >= 0).all()


@pytest.mark.parametrize("method", ["none", "temperature", "platt", "isotonic"])
def test_a_calibration_survives_json_and_keeps_to_probabilities(method):
    labels, predictions = _drawn(2.0, 300)
    found = fit(method, labels, predictions)
    again = Calibration.model_validate_json(found.model_dump_json())
    assert again == found
    asked = np.array([0.0, 1e-12, 0.3, 1.0, np.nan])
    given = again(asked)
    assert np.isnan(given[-1])
    assert ((given[:-1] >= 0) & (given[:-1] <= 1)).all()


def test_one_class_cannot_be_fitted():
    with pytest.raises(RunError, match="--calibrate temperature"):
        fit("temperature", [0, 0], [0.1, 0.2])


def test_an_ensembles_threshold_is_on_the_calibrated_scale(tmp_path: Path):
    run = make_run(tmp_path / "run")  # 0.7 for cancers, 0.3 for the others: a perfect, unsure model
    plain = open_ensemble([run], "cpu")
    sharp = open_ensemble([run], "cpu", calibrate="temperature")
    assert sharp.calibration.temperature < 0.1
    low, high = sharp.calibration([0.3, 0.7])
    assert low < 0.01
    assert high > 0.99
    assert 0.3 < plain.threshold <= 0.7
    assert sharp.calibration(0.3) < sharp.threshold <= sharp.calibration(0.7)
    for path in run.glob("fold*/validation.csv"):  # now not the same above a half as below it
        table = pd.read_csv(path, dtype={"image_id": str, "prediction_id": str})
        table.assign(prediction=table["prediction"] - 0.2).to_csv(path, index=False)
    lower = open_ensemble([run], "cpu", calibrate="temperature")
    assert lower.threshold == pytest.approx(lower.calibration([0.1, 0.5]).mean())


def test_a_breasts_mean_is_what_is_calibrated(tmp_path: Path):
    platt = Calibration(method="platt", temperature=2.0, bias=-1.0)
    ensemble = replace(open_ensemble([make_run(tmp_path / "run")], "cpu"), calibration=platt)
    frame = pd.DataFrame({"prediction_id": ["a", "a", "b"]})
    found = ensemble.combine(frame, np.array([[0.2], [0.6], [0.9]]))
    mean = np.array([0.4, 0.9])
    expected = 1 / (1 + np.exp(-(np.log(mean / (1 - mean)) / 2 - 1)))
    np.testing.assert_allclose(found[["a", "b"]], expected)
