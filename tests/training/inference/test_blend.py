"""Weights of runs, fitted out of fold, against a closed form, a grid and through a prediction."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import f1_score, log_loss, roc_auc_score

from preprocessing.errors import InputError, RunError
from tests.training.untrained import make_run
from training import metrics, run_files, runs
from training.inference.assemble import open_ensemble
from training.inference.blend import fit_aggregate, fit_weights


def _drawn(count: int = 2000, seed: int = 0):
    """Labels drawn from a mixture of two independent predictors, 0.7 of the first, and both predictors."""
    rng = np.random.default_rng(seed)
    predictions = rng.uniform(0.02, 0.98, (count, 2))
    return (rng.random(count) < predictions @ [0.7, 0.3]).astype(float), predictions


def test_the_mixture_that_drew_the_labels_is_found():
    labels, predictions = _drawn(20_000)
    assert fit_weights(labels, predictions) == pytest.approx([0.7, 0.3], abs=0.05)


def _recalibrated(labels: np.ndarray, predictions: np.ndarray) -> float:
    """Log loss after scikit-learn's logistic regression on the logits."""
    kept = np.clip(predictions, 1e-7, 1 - 1e-7)
    logits = np.log(kept / (1 - kept))[:, None]
    return log_loss(labels, LogisticRegression(C=1e9).fit(logits, labels).predict_proba(logits)[:, 1])


def test_no_weights_on_a_grid_lose_less():
    labels, predictions = _drawn(300, seed=1)
    found = _recalibrated(labels, predictions @ fit_weights(labels, predictions))
    grid = [_recalibrated(labels, predictions @ [share, 1 - share]) for share in np.linspace(0, 1, 201)]
    assert found <= min(grid) + 1e-4 * (max(grid) - min(grid)) + 1e-7


@pytest.mark.parametrize("prior", [0.02, 0.125, 0.5])
def test_how_a_runs_epochs_were_balanced_does_not_decide_how_much_it_counts(prior: float):
    """The weaker run says probabilities of the data's own prevalence, say, the stronger those of balanced epochs."""
    rng = np.random.default_rng(0)
    labels = (rng.random(24_000) < 0.02).astype(float)

    def run(separation: float, prior: float) -> np.ndarray:
        seen = rng.normal(separation * (labels - 0.5), 1)
        return 1 / (1 + np.exp(-(separation * seen + np.log(prior / (1 - prior)))))

    predictions = np.stack([run(1.0, prior), run(2.2, 0.5)], axis=1)
    strong = roc_auc_score(labels, predictions[:, 1])
    assert roc_auc_score(labels, predictions @ fit_weights(labels, predictions)) >= strong - 0.001


@pytest.mark.parametrize("seed", [43, 110, 113, 140])
def test_no_mixture_loses_to_one_of_its_runs_alone(seed: int):
    """Runs that are far too sure, of few breasts: where a search alone ends short of the best."""
    rng = np.random.default_rng(seed)
    labels = (rng.random(100) < 0.08).astype(float)
    labels[:2] = 0, 1
    seen = labels * rng.uniform(0.8, 2) + rng.normal(size=100) * 0.5
    sure = (seen[:, None] + rng.normal(size=(100, 2)) * rng.uniform(0.5, 1.5, 2)) * rng.uniform(5, 15, 2)
    predictions = 1 / (1 + np.exp(-np.clip(sure - rng.uniform(0, 30, 2), -30, 30)))
    found = _recalibrated(labels, predictions @ fit_weights(labels, predictions))
    others = [predictions[:, 0], predictions[:, 1], predictions.mean(axis=1)]
    assert found <= min(_recalibrated(labels, each) for each in others) + 1e-3


def test_a_run_beside_one_of_tiny_probabilities_is_not_left_out_for_its_small_weight():
    """Two runs that know as much, of which one says thousandths of what the other does."""
    rng = np.random.default_rng(0)
    labels = (rng.random(2000) < 0.15).astype(float)
    seen = 1.5 * (labels[:, None] + rng.normal(size=(2000, 2)))
    predictions = 1 / (1 + np.exp(-(seen - [12, 1])))
    found = _recalibrated(labels, predictions @ fit_weights(labels, predictions))
    shares = [_recalibrated(labels, predictions @ [1 - share, share]) for share in np.r_[0, np.logspace(-7, 0, 60)]]
    assert found <= min(shares) + 1e-4
    assert found < min(shares[0], shares[-1]) - 0.02, "either run alone"


def test_no_random_mixture_of_four_runs_loses_less():
    rng = np.random.default_rng(1)
    labels = (rng.random(400) < 0.15).astype(float)
    seen = labels * rng.uniform(1, 2.5) + rng.normal(size=400) * 0.5
    noisy = seen[:, None] + rng.normal(size=(400, 4)) * rng.uniform(0.3, 1.5, 4)
    predictions = 1 / (1 + np.exp(-(noisy * rng.uniform(0.5, 3, 4) - rng.uniform(0, 6, 4))))
    found = _recalibrated(labels, predictions @ fit_weights(labels, predictions))
    mixtures = [*np.eye(4), *rng.dirichlet(np.full(4, 0.3), 150)]
    assert found <= min(_recalibrated(labels, predictions @ each) for each in mixtures) + 1e-5


@pytest.mark.parametrize("seed", [1, 2])
def test_of_mixtures_that_are_as_good_that_of_the_better_run_is_taken(seed: int):
    """Beside a run of two values constant ones change nothing: every mixture tells the same two groups apart."""
    rng = np.random.default_rng(seed)
    high = rng.random(1000) < 0.3
    labels = (rng.random(1000) < np.where(high, 0.6, 0.1)).astype(float)
    low, top, constant = rng.uniform([0.05, 0.5, 0.05], [0.3, 0.9, 0.9])
    runs_of = np.full(1000, constant), np.where(high, top, low), np.full(1000, 1 - constant)
    assert fit_weights(labels, np.stack(runs_of, axis=1)) == pytest.approx([0, 1, 0], abs=1e-6)


def test_a_run_that_knows_nothing_counts_for_nothing():
    labels, predictions = _drawn(2000, seed=2)
    blind = np.full((2000, 1), 1 - labels.mean())
    weights = fit_weights(labels, np.hstack([labels[:, None] * 0.8 + 0.1, blind]))
    assert weights == pytest.approx([1, 0], abs=1e-6)
    assert fit_weights(labels, predictions[:, :1]).tolist() == [1]


def test_one_class_cannot_be_fitted():
    with pytest.raises(RunError, match="--weights fitted"):
        fit_weights([0, 0], [[0.1, 0.2], [0.3, 0.4]])


@pytest.mark.parametrize("exponent", [1, 2.5, 40])
def test_the_generalised_mean_is_its_closed_form(exponent):
    predictions, groups = pd.Series([0.2, 0.6, 0.9, 0.0, 0.0]), pd.Series(["a", "a", "b", "c", "c"])
    found = metrics.aggregate_predictions(predictions, groups, f"power:{exponent}")
    expected = [((0.2**exponent + 0.6**exponent) / 2) ** (1 / exponent), 0.9, 0.0]
    np.testing.assert_allclose(found, expected, atol=1e-12)


def _pictures(peaked: bool, breasts: int = 3000) -> pd.DataFrame:
    """Four pictures a breast. Cancer shows in one of them where `peaked`, else a little in all."""
    rng = np.random.default_rng(0)
    cancer = (rng.random(breasts) < 0.3).astype(float)
    lift = np.zeros((breasts, 4))
    lift[:, 0] = 3.0
    logits = rng.normal(-1, 1, (breasts, 4)) + cancer[:, None] * (lift if peaked else 0.8)
    return pd.DataFrame(
        {
            "prediction_id": np.repeat(np.arange(breasts), 4).astype(str),
            "cancer": np.repeat(cancer, 4),
            "prediction": (1 / (1 + np.exp(-logits))).ravel(),
        }
    )


def test_the_exponent_follows_how_cancer_shows():
    everywhere, somewhere = (fit_aggregate(_pictures(peaked)) for peaked in (False, True))
    assert float(everywhere.removeprefix("power:")) < 1.5
    assert float(somewhere.removeprefix("power:")) > 3
    pictures = _pictures(peaked=True)
    auroc = [
        metrics.summarise(breasts["cancer"], breasts["prediction"])["auroc"]
        for breasts in (metrics.per_breast(pictures.assign(patient_id="p"), each) for each in (somewhere, "mean"))
    ]
    assert auroc[0] > auroc[1] + 0.01


def test_no_other_exponent_tells_the_breasts_better_apart():
    """Cancer shows in one picture of four, not so clearly that the maximum would be the best."""
    rng = np.random.default_rng(0)
    cancer = (rng.random(600) < 0.3).astype(float)
    logits = rng.normal(-1, 1, (600, 4)) + cancer[:, None] * [2.1, 0.3, 0.3, 0.3]
    columns = {"cancer": np.repeat(cancer, 4), "prediction": (1 / (1 + np.exp(-logits))).ravel()}
    pictures = pd.DataFrame({"prediction_id": np.repeat(np.arange(600), 4).astype(str), **columns})
    gaps = [pictures.assign(prediction_id=name + pictures["prediction_id"], **{name: np.nan}) for name in columns]
    found = fit_aggregate(pd.concat([pictures, *gaps]))

    def loss(exponent):
        breasts = metrics.per_breast(pictures, f"power:{exponent:.3f}")
        return _recalibrated(breasts["cancer"], breasts["prediction"].to_numpy())

    assert loss(float(found.removeprefix("power:"))) <= min(map(loss, np.geomspace(1, 50, 40))) + 1e-5


def test_breasts_of_one_class_fit_no_exponent():
    with pytest.raises(RunError, match="--aggregate fitted"):
        fit_aggregate(_pictures(peaked=True).assign(cancer=0.0))


def test_an_ensemble_aggregates_as_it_is_told(tmp_path: Path):
    run = make_run(tmp_path / "run")
    assert open_ensemble([run], "cpu").aggregates == ("mean",)
    assert open_ensemble([run], "cpu", aggregate="noisy_or").aggregates == ("noisy_or",)
    (fitted,) = open_ensemble([run], "cpu", aggregate="fitted").aggregates
    assert fitted.startswith("power:")


def _spread(run: Path, seed: int) -> pd.DataFrame:
    """The run with predictions and ages at random; its pictures."""
    rng = np.random.default_rng(seed)
    tables = []
    for fold in runs.open_run(run).folds:
        count = len(fold.validation)
        drawn = {"prediction": rng.uniform(0.1, 0.9, count), "age": np.repeat(rng.uniform(40, 80, count // 2), 2)}
        tables.append(fold.validation.assign(**drawn))
        run_files.write_table(fold.folder / runs.VALIDATION, tables[-1])
    return pd.concat(tables)


@pytest.mark.parametrize(
    ("options", "aggregate"),
    [({}, "mean"), ({"weights": (1, 5)}, "mean"), ({"aggregate": "max"}, "max"), ({"names": ["age"]}, "mean")],
)
@pytest.mark.parametrize("seed", range(3))
def test_the_threshold_is_the_best_for_what_is_predicted(options: dict, aggregate: str, seed: int, tmp_path: Path):
    two = [make_run(tmp_path / name) for name in ("one", "other")]
    how = {"prediction": aggregate, "cancer": "max", "age": "first"}
    breasts = [_spread(run, 2 * seed + number).groupby("prediction_id").agg(how) for number, run in enumerate(two)]
    ensemble = open_ensemble(two, "cpu", **options)
    said = [fit(each["prediction"], each) for fit, each in zip(ensemble.covariates, breasts, strict=True)]
    mixed, cancer = np.average(said, axis=0, weights=options.get("weights")), breasts[0]["cancer"]
    assert f1_score(cancer, mixed >= ensemble.threshold) == max(f1_score(cancer, mixed >= cut) for cut in mixed)
    assert np.abs(mixed - ensemble.threshold).min() > 1e-4  # between two breasts, not on one


def _spoilt(run: Path) -> Path:
    """The run with predictions that say nothing."""
    for fold in runs.open_run(run).folds:
        run_files.write_table(fold.folder / runs.VALIDATION, fold.validation.assign(prediction=0.5))
    return run


def test_an_ensemble_leaves_a_useless_run_out_and_says_so(tmp_path: Path):
    good, useless = make_run(tmp_path / "good"), _spoilt(make_run(tmp_path / "useless", seed=1))
    ensemble = open_ensemble([good, useless], "cpu", weights="fitted")
    assert ensemble.weights == pytest.approx([1, 0], abs=1e-4)
    described = json.loads(json.dumps(run_files.plain(ensemble.describe())))
    assert [run["name"] for run in described["runs"]] == [str(good), str(useless)]
    assert [len(run["models"]) for run in described["runs"]] == [2, 2]
    assert described["threshold"] == ensemble.threshold


def test_runs_that_held_out_other_breasts_cannot_be_weighed(tmp_path: Path):
    one, other = make_run(tmp_path / "one"), make_run(tmp_path / "other", seed=1)
    for fold in runs.open_run(other).folds:
        table = fold.validation
        renamed = table.assign(prediction_id="x" + table["prediction_id"].astype(str))
        run_files.write_table(fold.folder / runs.VALIDATION, renamed)
    with pytest.raises(RunError, match="0 breasts were held out by every run"):
        open_ensemble([one, other], "cpu", weights="fitted")
    with pytest.raises(InputError, match=r"expected 2 number\(s\)"):
        open_ensemble([one, other], "cpu", weights=[1])


def test_folds_of_different_splits_are_no_ensemble(tmp_path):
    run = make_run(tmp_path / "run")
    shutil.copytree(run / "fold1", run / "fold2")
    table = runs.FoldRun(run / "fold1", 1).validation
    run_files.write_table(run / "fold2" / runs.VALIDATION, table.assign(fold=2))
    with pytest.raises(RunError, match="run: picture 10CC was held out in two folds"):
        open_ensemble([run], "cpu")


@pytest.mark.parametrize("second", ["", "fold0"])
def test_a_fold_that_would_count_twice_is_named(tmp_path: Path, second: str):
    run = make_run(tmp_path / "run")
    with pytest.raises(InputError, match="run/fold0 is named twice"):
        open_ensemble([run, run / second], "cpu")


def test_breasts_of_one_run_alone_are_judged_by_that_run(tmp_path: Path):
    """Equal weights: a breast that only one run held out keeps that run's prediction."""
    one, other = make_run(tmp_path / "one"), make_run(tmp_path / "other", folds=1, seed=1)
    alone = open_ensemble([one], "cpu")
    both = open_ensemble([one, other], "cpu")
    assert both.threshold == alone.threshold  # all predict 0.3 and 0.7
    assert both.prior == pytest.approx(alone.prior)
