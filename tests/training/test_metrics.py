"""Every figure against scikit-learn, torchmetrics or a closed form."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn import metrics as sk
from torchmetrics.functional.classification import binary_calibration_error

from training import metrics


def _challenge_pf1(labels, predictions, beta=1):
    """The challenge's own definition, written out as its page has it."""
    y_true_count, ctp, cfp = 0, 0.0, 0.0
    for label, prediction in zip(labels, np.clip(predictions, 0, 1), strict=True):
        if label:
            y_true_count += 1
            ctp += prediction
        else:
            cfp += prediction
    precision = ctp / (ctp + cfp)
    recall = ctp / y_true_count
    if precision > 0 and recall > 0:
        return (1 + beta**2) * (precision * recall) / (beta**2 * precision + recall)
    return 0


def _sample(seed, n=200, levels=None):
    generator = np.random.default_rng(seed)
    labels = (generator.random(n) < 0.2).astype(float)
    predictions = np.clip(0.3 * labels + 0.7 * generator.random(n), 0, 1)
    if levels:  # many ties
        predictions = np.round(predictions * levels) / levels
    return labels, predictions


SAMPLES = [(0, None), (1, 5), (2, 20), (3, None)]


@pytest.mark.parametrize(("seed", "levels"), SAMPLES)
def test_pf1_is_the_challenges(seed, levels):
    labels, predictions = _sample(seed, levels=levels)
    predictions = predictions * 1.6 - 0.3  # partly outside [0, 1]
    assert metrics.pf1(labels, predictions) == pytest.approx(_challenge_pf1(labels, predictions), rel=1e-12)


def test_pf1_of_ones_everywhere_is_twice_the_prevalence_over_one_more():
    labels = np.r_[np.ones(25), np.zeros(975)]
    assert metrics.pf1(labels, np.ones(1000)) == pytest.approx(2 * 0.025 / 1.025)


def test_pf1_is_zero_where_nothing_positive_is_found_or_there():
    assert metrics.pf1([1, 0], [0, 1]) == 0
    assert metrics.pf1([0, 0], [0.5, 1]) == 0
    assert metrics.pf1([], []) == 0


@pytest.mark.parametrize(("seed", "levels"), SAMPLES)
def test_figures_agree_with_scikit_learn(seed, levels):
    labels, predictions = _sample(seed, levels=levels)
    found = metrics.summarise(labels, predictions)
    assert found["auroc"] == pytest.approx(sk.roc_auc_score(labels, predictions), abs=1e-12)
    assert found["average_precision"] == pytest.approx(sk.average_precision_score(labels, predictions), abs=1e-12)
    assert found["log_loss"] == pytest.approx(sk.log_loss(labels, np.clip(predictions, 1e-7, 1 - 1e-7)), abs=1e-9)
    best = max(sk.f1_score(labels, predictions >= t) for t in np.unique(predictions))
    assert found["pf1_best"] == pytest.approx(best, abs=1e-12)
    assert metrics.pf1_at(labels, predictions, found["threshold"]) == pytest.approx(best, abs=1e-12)
    fpr, tpr, _ = sk.roc_curve(labels, predictions, drop_intermediate=False)
    for specificity, sensitivity in found["sensitivity_at_specificity"].items():
        assert sensitivity == pytest.approx(tpr[fpr <= 1 - float(specificity) + 1e-12].max(), abs=1e-12)


@pytest.mark.parametrize(("seed", "levels"), SAMPLES)
def test_calibration_error_agrees_with_torchmetrics(seed, levels):
    labels, predictions = _sample(seed, levels=levels)
    # float32 there: keep predictions off the edges of bins, where rounding decides.
    predictions = np.where(np.isclose(predictions * 15 % 1, 0, atol=1e-4), predictions + 0.01, predictions).clip(
        0, 0.999
    )
    expected = binary_calibration_error(torch.tensor(predictions), torch.tensor(labels).int(), n_bins=15, norm="l1")
    assert metrics.ece(labels, predictions) == pytest.approx(float(expected), abs=1e-6)


def test_a_prediction_at_the_threshold_counts_as_one_above_it():
    assert metrics.pf1_at([1, 0], [0.5, 0.4], 0.5) == 1
    found = metrics.summarise([1, 1, 0, 0], [0.9, 0.3, 0.3, 0.1], threshold=0.9)["at_threshold"]
    assert (found["true_positives"], found["false_positives"]) == (1, 0)
    assert (found["false_negatives"], found["true_negatives"]) == (1, 2)


def test_the_best_threshold_lies_midway_and_below_all_where_all_are_to_be_called():
    assert metrics.pf1_best([1, 0, 0], [0.8, 0.3, 0.1]) == (1, pytest.approx(0.55))
    assert metrics.pf1_best([1, 1], [0.3, 0.2]) == (1, pytest.approx(0.1))
    assert metrics.pf1_best([0, 0], [0.3, 0.2]) == (0, 0.5)


def test_a_specificity_that_is_just_reached_counts():
    """One false alarm among ten is a specificity of 0.9, two are one of 0.8, whatever 1 - 0.9 is in binary."""
    labels, predictions = [0, 1, 0, 1] + [0] * 8, np.linspace(0.9, 0.1, 12)
    found = metrics.summarise(labels, predictions)["sensitivity_at_specificity"]
    assert found == {"0.8": 1, "0.9": 0.5, "0.95": 0}


def test_a_prediction_on_the_edge_of_two_bins_belongs_to_the_lower_one():
    """Guo et al. 2017, section 2: bin m is ((m - 1) / M, m / M]."""
    assert metrics.ece([0, 1], [0.4, 0.5], bins=2) == pytest.approx(abs(0 + 1 - 0.4 - 0.5) / 2)


def test_weights_count_as_so_many_rows_and_pf1_clips_here_too():
    labels, predictions = _sample(7, n=60, levels=10)
    predictions = predictions * 1.4 - 0.2  # partly outside [0, 1]
    times = np.random.default_rng(7).integers(0, 4, 60)
    found = metrics.ranking(labels, predictions, times[None].astype(float))
    labels, predictions = np.repeat(labels, times), np.repeat(predictions, times)
    assert found["auroc"][0] == pytest.approx(sk.roc_auc_score(labels, predictions))
    assert found["average_precision"][0] == pytest.approx(sk.average_precision_score(labels, predictions))
    assert found["pf1"][0] == pytest.approx(_challenge_pf1(labels, predictions))


def test_confusion_counts_agree_with_scikit_learn():
    labels, predictions = _sample(5)
    found = metrics.confusion(labels, predictions, 0.5)
    tn, fp, fn, tp = sk.confusion_matrix(labels, predictions >= 0.5).ravel()
    assert (found["true_negatives"], found["false_positives"]) == (tn, fp)
    assert (found["false_negatives"], found["true_positives"]) == (fn, tp)
    assert found["precision"] == pytest.approx(tp / (tp + fp))
    assert found["specificity"] == pytest.approx(tn / (tn + fp))


def test_a_breast_without_any_prediction_has_none_however_pictures_are_joined():
    predictions, groups = pd.Series([np.nan, np.nan, 0.5]), pd.Series(["a", "a", "b"])
    for aggregate in ("mean", "max", "noisy_or", "power:2"):
        found = metrics.aggregate_predictions(predictions, groups, aggregate)
        assert np.isnan(found["a"])
        assert found["b"] == pytest.approx(0.5)


@pytest.mark.parametrize("label", [0, 1])
def test_what_needs_both_classes_is_nan_without_them(label):
    found = metrics.summarise([label, label], [0.2, 0.7])
    assert np.isnan(found["auroc"])
    assert all(np.isnan(value) for value in found["sensitivity_at_specificity"].values())


def test_unknown_labels_are_left_out():
    labels, predictions = _sample(6)
    more = metrics.summarise(np.r_[labels, [np.nan] * 9], np.r_[predictions, np.ones(9)])
    assert more == metrics.summarise(labels, predictions)


def test_rows_without_a_prediction_are_left_out():
    labels, predictions = _sample(6)
    more = metrics.summarise(np.r_[labels, np.ones(9)], np.r_[predictions, [np.nan] * 9])
    assert more == metrics.summarise(labels, predictions)


def test_one_class_or_none_gives_no_ranking_figures():
    for labels in ([0, 0, 0], []):
        found = metrics.summarise(labels, [0.2] * len(labels))
        assert np.isnan(found["auroc"])
        assert np.isnan(found["average_precision"])
        assert found["pf1_best"] == 0
        assert found["positives"] == 0
    assert np.isnan(metrics.summarise([1, 1], [0.1, 0.9])["auroc"])


def _pictures():
    return pd.DataFrame(
        {
            "image_id": list("abcdef"),
            "patient_id": ["1", "1", "1", "2", "2", "2"],
            "laterality": ["L", "L", "R", "R", "R", "R"],
            "prediction_id": ["1_L", "1_L", "1_R", "2_R", "2_R", "2_R"],
            "cancer": [0, 1, 0, np.nan, np.nan, np.nan],
            "age": [49.9, 49.9, 49.9, np.nan, np.nan, np.nan],
            "machine_id": ["49", "49", "49", "", "", ""],
            "prediction": [0.2, 0.6, 0.1, 0.5, 0.5, 0.8],
        }
    )


@pytest.mark.parametrize(
    ("aggregate", "expected"),
    [("mean", [0.4, 0.1, 0.6]), ("max", [0.6, 0.1, 0.8]), ("noisy_or", [1 - 0.8 * 0.4, 0.1, 1 - 0.5 * 0.5 * 0.2])],
)
def test_breasts_gather_their_pictures(aggregate, expected):
    breasts = metrics.per_breast(_pictures(), aggregate)
    assert breasts["prediction_id"].tolist() == ["1_L", "1_R", "2_R"]
    assert breasts["images"].tolist() == [2, 1, 3]
    np.testing.assert_allclose(breasts["prediction"], expected, rtol=1e-9)
    np.testing.assert_array_equal(breasts["cancer"], [1, 0, np.nan])


def test_noisy_or_survives_a_prediction_of_one():
    frame = _pictures().assign(prediction=[1.0, 0.0, 0.0, 1.0, 1.0, 1.0])
    np.testing.assert_allclose(metrics.per_breast(frame, "noisy_or")["prediction"], [1, 0, 1])


def test_patients_take_their_worse_breast():
    patients = metrics.per_patient(metrics.per_breast(_pictures(), "mean"))
    assert patients["patient_id"].tolist() == ["1", "2"]
    np.testing.assert_allclose(patients["prediction"], [0.4, 0.6])
    np.testing.assert_array_equal(patients["cancer"], [1, np.nan])
