"""Covariates of a breast's probability: against scikit-learn, out of fold, and through evaluation and prediction."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from click.testing import CliRunner
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score

import cli
from preprocessing.errors import InputError, RunError
from preprocessing.manifest import Store
from tests.training import fakes
from tests.training.untrained import make_run, spread_ages
from training import run_files, runs
from training.config import load_config
from training.evaluation import evaluate
from training.inference import covariates
from training.inference.assemble import open_ensemble
from training.inference.covariates import Covariates, cross_fitted, fit, parse_names
from training.inference.predict import PredictSummary
from training.inference.submission import Results, asked_by_table, compose, judge


def _breasts(count: int = 4000, folds: int = 4, age_effect: float = 0.08) -> pd.DataFrame:
    """Breasts whose cancer depends on what the pictures show and on age, each in its own way; two a patient."""
    rng = np.random.default_rng(0)
    age = np.repeat(rng.normal(60, 10, count // 2), 2)
    seen = rng.normal(-1, 1, count)
    true = 1 / (1 + np.exp(-(seen + age_effect * (age - 60))))
    return pd.DataFrame(
        {
            "patient_id": np.repeat(np.arange(count // 2), 2).astype(str),
            "prediction_id": np.arange(count).astype(str),
            "cancer": (rng.random(count) < true).astype(float),
            "prediction": 1 / (1 + np.exp(-seen)),
            "age": age,
            "implant": 0.0,
            "fold": np.repeat(np.arange(count // 2) % folds, 2),
        }
    )


def test_it_is_the_logistic_regression_that_the_labels_were_drawn_from():
    breasts = _breasts(40_000)
    found = fit(["age"], breasts)
    assert found.slope == pytest.approx(1.0, rel=0.05)
    assert found.weights[0] == pytest.approx(0.08, rel=0.05)
    logits = np.log(breasts["prediction"] / (1 - breasts["prediction"]))
    inputs = np.column_stack([logits, breasts["age"]])
    reference = LogisticRegression(C=1e12, tol=1e-8).fit(inputs, breasts["cancer"]).predict_proba(inputs)[:, 1]
    np.testing.assert_allclose(found(breasts["prediction"], breasts), reference, atol=2e-3)


def test_without_names_nothing_changes():
    breasts = _breasts(100)
    np.testing.assert_array_equal(fit([], breasts)(breasts["prediction"], breasts), breasts["prediction"])
    assert evaluate.with_covariates(breasts, ()) is breasts


def test_an_unknown_age_is_taken_for_the_mean_one():
    breasts = _breasts(1000)
    found = fit(["age"], breasts)
    mean = pd.DataFrame({"age": [found.means[0]]})
    for table in (pd.DataFrame({"age": [np.nan]}), pd.DataFrame(index=[0])):
        np.testing.assert_array_equal(found([0.3], table), found([0.3], mean))
    assert np.isnan(found([np.nan], mean)).all()


def test_a_covariate_that_is_always_the_same_says_nothing():
    breasts = _breasts(1000)
    both, alone = fit(["age", "implant"], breasts), fit(["age"], breasts)
    assert both.weights[1] == 0
    np.testing.assert_allclose(both(breasts["prediction"], breasts), alone(breasts["prediction"], breasts), atol=1e-4)


def test_it_survives_json():
    found = fit(["age"], _breasts(1000))
    assert Covariates.model_validate_json(found.model_dump_json()) == found


def test_a_fold_is_predicted_by_what_was_fitted_on_the_others():
    breasts = _breasts(400)
    found = cross_fitted(["age"], breasts)
    own = breasts["fold"] == 2
    by_others = fit(["age"], breasts[~own])(breasts.loc[own, "prediction"], breasts[own])
    np.testing.assert_array_equal(found[own], by_others)


def test_a_breasts_own_label_has_no_say():
    """Turning a patient's labels leaves that patient's probabilities as they are, and changes others'."""
    breasts = _breasts(200)
    patient = breasts["patient_id"] == "7"
    turned = breasts.assign(cancer=breasts["cancer"].where(~patient, 1 - breasts["cancer"]))
    one, other = cross_fitted(["age"], breasts), cross_fitted(["age"], turned)
    np.testing.assert_array_equal(one[patient], other[patient])
    assert (one[~patient] != other[~patient]).any()


def test_a_single_folds_patients_are_parted_whole_and_those_with_cancer_evenly():
    breasts = _breasts(200).assign(fold=0, cancer=(np.arange(200) % 10 == 0).astype(float))  # one breast of each tenth
    parts = breasts.assign(part=covariates._patients_parted(["age"], breasts))
    assert (parts.groupby("patient_id")["part"].nunique() == 1).all()
    assert parts[parts["cancer"] == 1]["part"].value_counts().tolist() == [4] * 5


def test_breasts_without_label_or_prediction_have_no_say():
    breasts = _breasts(400)
    gaps = [breasts.assign(**{name: np.nan}, age=90.0) for name in ("cancer", "prediction")]
    assert fit(["age"], pd.concat([breasts, *gaps])) == fit(["age"], breasts)


@pytest.mark.parametrize("folds", [1, 4])
def test_noise_as_a_covariate_does_not_flatter(folds: int):
    """Twenty sets of labels that depend on nothing: cross-fitted they are ranked by chance, in the mean."""
    found = []
    for seed in range(20):
        rng = np.random.default_rng(seed)
        breasts = _breasts(200, folds=folds).assign(cancer=rng.integers(0, 2, 200).astype(float))
        found.append(roc_auc_score(breasts["cancer"], cross_fitted(["age"], breasts)))
    assert np.mean(found) < 0.52


def test_what_cannot_be_fitted_says_what_to_do():
    breasts = _breasts(100)
    with pytest.raises(RunError, match=r"all of one class.*--covariates none"):
        fit(["age"], breasts.assign(cancer=0.0))
    with pytest.raises(RunError, match=r"age is unknown for all.*--covariates none"):
        fit(["age"], breasts.assign(age=np.nan))
    one_cancer = breasts.assign(fold=0, cancer=(breasts["prediction_id"] == "3").astype(float))
    with pytest.raises(RunError, match="at least two patients with and two without"):
        cross_fitted(["age"], one_cancer)


def test_names_are_read_from_text():
    assert parse_names(None) is None
    assert parse_names("none") == ()
    assert parse_names("age, implant,age") == ("age", "implant")
    with pytest.raises(InputError, match="--covariates age,weight: expected 'none' or some of age, implant"):
        parse_names("age,weight")


def _run(root: Path, breasts: pd.DataFrame, *overrides: str) -> Path:
    """A run whose validation predictions are these, a picture a breast."""
    config = load_config(None, overrides)
    for number, part in breasts.groupby("fold"):
        folder = root / f"fold{number}"
        runs.begin(folder, config, {})
        table = part.assign(
            image_id=part["prediction_id"], laterality="L", view="CC", site_id="1", machine_id="49", density="B"
        )
        run_files.write_table(folder / runs.VALIDATION, table[list(run_files.VALIDATION_COLUMNS)])
        run_files.write_json(folder / runs.SUMMARY, {})
    return root


def test_evaluation_shows_both(tmp_path: Path):
    breasts = _breasts(800)
    found = evaluate.evaluate(_run(tmp_path, breasts), resamples=20, names=["age"])
    alone = roc_auc_score(breasts["cancer"], breasts["prediction"])
    assert found["pictures_alone"]["auroc"] == pytest.approx(alone)
    assert found["breast"]["auroc"] == pytest.approx(
        roc_auc_score(breasts["cancer"], cross_fitted(["age"], breasts)), abs=1e-12
    )
    assert found["breast"]["auroc"] > alone + 0.02
    assert found["picture"]["auroc"] == pytest.approx(alone)
    written = pd.read_csv(tmp_path / "out_of_fold.csv", dtype={"prediction_id": str}).set_index("prediction_id")
    np.testing.assert_allclose(
        written.loc[breasts["prediction_id"], "pictures"], breasts["prediction"].to_numpy(np.float64), rtol=1e-13
    )
    shown = [row["value"] for row in evaluate.headline(found) if row["figure"] == "judged by"]
    assert shown == [
        f"with age; pictures alone {alone:.4f}, mean of folds {found['pictures_alone']['mean_of_folds']:.4f}"
    ]


def test_the_runs_own_setting_holds_unless_the_call_says_otherwise(tmp_path: Path):
    run = _run(tmp_path, _breasts(400), "train.covariates=[age]")
    assert evaluate.evaluate(run, resamples=20)["covariates"] == ["age"]
    without = evaluate.evaluate(run, resamples=20, names=())
    assert without["covariates"] == []
    assert without["pictures_alone"] is None


def test_an_older_patient_gets_a_higher_probability(tmp_path: Path):
    run = spread_ages(make_run(tmp_path / "run"))
    ensemble = open_ensemble([run], "cpu", names=["age"])
    frame = pd.DataFrame(
        {"prediction_id": ["a", "a", "b", "c"], "age": [np.nan, 75.0, 45.0, np.nan], "implant": np.nan}
    )
    found = ensemble.combine(frame, np.full((4, 1), 0.4))
    assert found["a"] > found["c"] > found["b"]
    validation = pd.concat([fold.validation for fold in runs.open_run(run).folds])
    breasts = validation.groupby("prediction_id")[["cancer", "prediction", "age"]].first()
    own = fit(["age"], breasts)
    assert ensemble.covariates == (own,)
    np.testing.assert_allclose(found["b"], own([0.4], pd.DataFrame({"age": [45.0]}))[0], rtol=1e-12)
    assert ensemble.describe()["covariates"][0]["names"] == ["age"]
    assert open_ensemble([run], "cpu").combine(frame, np.full((4, 1), 0.4)).to_list() == [0.4] * 3


def test_age_comes_from_the_table_else_from_the_file(tmp_path: Path):
    listed = pd.DataFrame(
        {
            "image_id": ["1", "2", "3"],
            "patient_id": ["p", "q", "r"],
            "laterality": ["L", "L", "L"],
            "age": ["71", "", "unknown"],
        }
    )
    facts = pd.DataFrame(
        {
            "image_id": ["1", "2", "3"],
            **{name: ["", "", ""] for name in ("patient_id", "laterality", "view", "prediction_id")},
            "age": [50.0, 52.0, np.nan],
            "implant": [0.0, 1.0, 0.0],
        }
    )
    results = Results(facts, np.full((3, 1), 0.4), [])
    judged = judge(asked_by_table(listed), results, from_store=False)
    np.testing.assert_array_equal(judged["age"], [71, 52, np.nan])
    np.testing.assert_array_equal(judged["implant"], [0, 1, 0])
    ensemble = open_ensemble([spread_ages(make_run(tmp_path / "run"))], "cpu", names=["age"])
    written = compose(ensemble, judged, results)
    made = written.submission.set_index("prediction_id")["cancer"]
    assert made["p_L"] > made["r_L"] > made["q_L"]
    assert written.of_mean == {"age": 1}
    summary = PredictSummary(Path("s.csv"), 3, 3, 0, 0, 0.5, written.of_mean)
    assert str(summary).endswith("1 of the breasts count as of mean age: neither the table nor the files say theirs.")


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return fakes.make_store(tmp_path_factory.mktemp("covariates") / "store")


def test_the_command_line_takes_them(tmp_path: Path, store: Store):
    run = _run(tmp_path / "run", _breasts(200))
    for fold in runs.open_run(run).folds:
        run_files.write_json(fold.folder / runs.ENVIRONMENT, {"store_fingerprint": store.fingerprint})
    arguments = ["evaluate", "--runs", str(run), "--store", str(store.root), "--covariates"]
    done = CliRunner().invoke(cli.main, [*arguments, "age"], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    assert "with age; pictures alone" in " ".join(done.output.split())
    refused = CliRunner().invoke(cli.main, [*arguments, "weight"])
    assert refused.exit_code == 2
    assert "--covariates weight: expected 'none'" in refused.output
