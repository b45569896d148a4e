"""Evaluation over out-of-fold predictions, on run folders written by hand, so that every figure is known."""

from __future__ import annotations

import json

import numpy as np
import pandas as pd
import pytest
from sklearn import metrics as sk

from preprocessing.errors import RunError
from tests.training import fakes
from training import metrics, run_files, runs
from training.evaluation import evaluate, intervals


def _write_run(root, frame, unfinished=(), machines=None, fingerprint="abc"):
    for fold, part in frame.groupby("fold"):
        folder = root / f"fold{fold}"
        trained = {"machines": machines or sorted(frame["machine_id"].unique()), "sites": ["1", "2"]}
        runs.begin(folder, fakes.small_config(), {"store_fingerprint": fingerprint, "store": "s", "training": trained})
        run_files.write_table(folder / runs.VALIDATION, part[[c for c in run_files.VALIDATION_COLUMNS if c in part]])
        if fold not in unfinished:
            run_files.write_json(folder / runs.SUMMARY, {})
    return root


def _frame(patients=60, folds=3, seed=0, signal=2.0):
    rows = fakes.make_rows(patients)
    generator = np.random.default_rng(seed)
    logits = signal * rows["cancer"] - 1 + generator.normal(size=len(rows))
    fold = rows["patient_id"].str[1:].astype(int) // 3 % folds
    return rows.assign(prediction=1 / (1 + np.exp(-logits)), fold=fold)


def test_figures_are_those_of_all_folds_breasts_together(tmp_path):
    frame = _frame()
    found = evaluate.evaluate(_write_run(tmp_path, frame), resamples=50)
    breasts = frame.groupby("prediction_id").agg({"cancer": "max", "prediction": "mean"})
    assert found["breast"]["auroc"] == pytest.approx(sk.roc_auc_score(breasts["cancer"], breasts["prediction"]))
    assert found["picture"]["auroc"] == pytest.approx(sk.roc_auc_score(frame["cancer"], frame["prediction"]))
    assert found["breast"]["count"] == len(breasts)
    folds = [sk.roc_auc_score(part["cancer"], part["prediction"]) for _, part in _breasts_by_fold(frame)]
    assert found["mean_of_folds"]["auroc"] == pytest.approx(np.mean(folds))
    assert [part["breast"]["auroc"] for part in found["folds"]] == pytest.approx(folds)
    low, high = found["breast"]["intervals"]["auroc"]
    assert low < found["breast"]["auroc"] < high


def _breasts_by_fold(frame):
    breasts = frame.groupby("prediction_id").agg({"cancer": "max", "prediction": "mean", "fold": "first"})
    return breasts.groupby("fold")


def test_what_is_written_is_what_is_returned(tmp_path):
    found = evaluate.evaluate(_write_run(tmp_path, _frame()), resamples=50)
    assert json.loads((tmp_path / "metrics.json").read_text()) == found
    table = pd.read_csv(tmp_path / "metrics.csv")
    whole = table[(table["level"] == "breast") & (table["group"] == "all")].iloc[0]
    assert whole["auroc"] == pytest.approx(found["breast"]["auroc"])
    assert len(pd.read_csv(tmp_path / "out_of_fold.csv")) == found["breast"]["count"]


def test_the_threshold_of_a_fold_is_chosen_on_the_others(tmp_path):
    """A fold on a scale of its own scores badly at the others' threshold, whatever its own best would be."""
    frame = _frame(signal=20.0)
    found = evaluate.evaluate(_write_run(tmp_path / "same", frame), resamples=50)
    assert found["threshold"]["pf1_out_of_fold"] > 0.95
    shifted = frame.assign(prediction=frame["prediction"].where(frame["fold"] != 2, frame["prediction"] * 1e-4))
    found = evaluate.evaluate(_write_run(tmp_path / "shifted", shifted), resamples=50)
    own = shifted[shifted["fold"] == 2]
    assert metrics.pf1_best(own["cancer"], own["prediction"])[0] > 0.9
    assert found["threshold"]["pf1_out_of_fold"] < 0.85


def test_a_threshold_that_is_good_for_the_others_alone_is_bad_for_the_fold():
    breasts = pd.DataFrame({"fold": [0, 0, 1, 1], "cancer": [0.0, 1, 0, 1], "prediction": [0.1, 0.2, 0.8, 0.9]})
    # Fold 0's threshold finds both of fold 1's, fold 1's none of fold 0's; chosen on all of them it would be 0.8.
    assert evaluate._cross_thresholded(breasts)["prediction"].tolist() == [0, 0, 1, 1]
    assert evaluate._cross_thresholded(breasts.assign(fold=0)) is None
    at_it = breasts.assign(prediction=[0.1, 0.5, 0.25, 0.75])  # fold 1's threshold is 0.5
    assert evaluate._cross_thresholded(at_it)["prediction"].tolist() == [0, 1, 0, 1]


def test_pictures_and_folds_are_counted_at_the_runs_own_threshold(tmp_path):
    frame = _frame()
    found = evaluate.evaluate(_write_run(tmp_path, frame), resamples=20)
    value, breasts = found["threshold"]["value"], metrics.per_breast(frame)
    parts = [(found["picture"], frame)]
    parts += [(part["breast"], breasts[breasts["fold"] == part["fold"]]) for part in found["folds"]]
    for figures, rows in parts:
        tn, fp, fn, tp = sk.confusion_matrix(rows["cancer"], rows["prediction"] >= value).ravel()
        counted = figures["at_threshold"]
        names = ("true_negatives", "false_positives", "false_negatives", "true_positives")
        assert [counted[name] for name in names] == [tn, fp, fn, tp]


def test_patients_are_judged_by_their_breasts_covariates_too(tmp_path):
    found = evaluate.evaluate(_write_run(tmp_path, _frame(signal=1.0)), resamples=20, names=["age"])
    patients = (
        pd.read_csv(tmp_path / "out_of_fold.csv").groupby("patient_id").agg({"cancer": "max", "prediction": "max"})
    )
    assert found["patient"]["log_loss"] == pytest.approx(sk.log_loss(patients["cancer"], patients["prediction"]))


def test_an_unstable_threshold_is_warned_of_and_a_clear_one_is_not(tmp_path):
    clear = evaluate.evaluate(_write_run(tmp_path / "clear", _frame(patients=150, signal=30.0)), resamples=200)
    assert not clear["threshold"]["unstable"]
    assert clear["warnings"] == []
    noise = evaluate.evaluate(_write_run(tmp_path / "noise", _frame(patients=24, signal=0.3)), resamples=200)
    assert noise["threshold"]["unstable"]
    assert any("threshold is unstable" in text for text in noise["warnings"])
    few = evaluate.evaluate(_write_run(tmp_path / "few", _frame(patients=8)), resamples=50)
    assert few["threshold"]["interval"] is None
    assert any("Too few patients" in text for text in few["warnings"])
    assert not any("interval is wide" in text or "unstable" in text for text in few["warnings"])


def test_subgroups_cover_every_breast_once_in_each_group(tmp_path):
    found = evaluate.evaluate(_write_run(tmp_path, _frame()), resamples=20)
    counts = pd.DataFrame(found["subgroups"]).groupby("group")["count"].sum()
    breasts, pictures = found["breast"]["count"], found["picture"]["count"]
    assert counts.to_dict() == dict.fromkeys(evaluate.BREAST_GROUPS, breasts) | {"view": pictures}


def test_a_machines_figures_have_the_interval_of_its_own_patients(tmp_path):
    frame = _frame()
    found = evaluate.evaluate(_write_run(tmp_path, frame), resamples=50)
    (part,) = (part for part in found["subgroups"] if (part["group"], part["value"]) == ("machine_id", "29"))
    breasts = metrics.per_breast(frame)
    own = intervals.bootstrap(breasts[breasts["machine_id"] == "29"], 50)
    assert part["intervals"]["auroc"] == pytest.approx(own["auroc"])
    assert part["intervals"]["resamples"] == own["resamples"]
    low, high = part["intervals"]["auroc"]
    assert low < part["auroc"] < high
    table = pd.read_csv(tmp_path / "metrics.csv", dtype={"value": str})
    row = table[(table["group"] == "machine_id") & (table["value"] == "29")].iloc[0]
    assert (row["auroc_low"], row["auroc_high"]) == pytest.approx((low, high))
    assert table.loc[table["level"] == "picture", "auroc_low"].isna().any(), "not asked for of all pictures"


def test_machines_that_training_never_saw_stand_beside_the_others(tmp_path):
    frame = _frame()
    found = evaluate.evaluate(_write_run(tmp_path, frame, machines=["48", "49"]), resamples=20)["unseen"]
    assert found["machines"] == ["29"]
    assert found["sites"] == []
    new = frame[frame["machine_id"] == "29"]
    breasts = new.groupby("prediction_id").agg({"cancer": "max", "prediction": "mean"})
    assert found["unseen"]["auroc"] == pytest.approx(sk.roc_auc_score(breasts["cancer"], breasts["prediction"]))
    assert found["unseen"]["count"] + found["seen"]["count"] == frame["prediction_id"].nunique()


def test_what_one_folds_model_never_saw_is_unseen_in_that_fold_alone(tmp_path):
    frame = _frame()
    root = _write_run(tmp_path, frame)
    for fold, kind in ((0, "machines"), (1, "sites")):
        trained = {"machines": ["29", "48", "49"], "sites": ["1", "2"]}
        trained[kind] = trained[kind][1:]
        run_files.write_json(root / f"fold{fold}" / runs.ENVIRONMENT, {"training": trained})
    found = evaluate.evaluate(root, resamples=20)["unseen"]
    new = ((frame["fold"] == 0) & (frame["machine_id"] == "29")) | ((frame["fold"] == 1) & (frame["site_id"] == "1"))
    assert (found["machines"], found["sites"]) == (["29"], ["1"])
    assert found["unseen"]["count"] == frame.loc[new, "prediction_id"].nunique()


def test_nothing_unseen_is_none(tmp_path):
    assert evaluate.evaluate(_write_run(tmp_path, _frame()), resamples=20)["unseen"] is None


def test_a_site_that_is_called_na_is_a_site(tmp_path):
    """pandas reads NA, null and others as missing, which conversion does not."""
    frame = _frame()
    frame = frame.assign(site_id=frame["site_id"].map({"1": "NA", "2": "EU"}), density="null")
    root = _write_run(tmp_path, frame)
    for fold in runs.open_run(root).folds:
        run_files.write_json(fold.folder / runs.ENVIRONMENT, {"training": {"sites": ["NA", "EU"]}})
    found = evaluate.evaluate(root, resamples=20)
    assert found["unseen"] is None
    groups = {(part["group"], part["value"]) for part in found["subgroups"]}
    assert {("site_id", "NA"), ("site_id", "EU"), ("density", "null")} < groups


def test_a_run_without_positives_is_evaluated_and_printed(tmp_path):
    found = evaluate.evaluate(_write_run(tmp_path, _frame().assign(cancer=0.0)), resamples=20)
    assert found["breast"]["auroc"] is None
    assert found["threshold"]["unstable"]
    rows = evaluate.headline(found)
    assert {"figure": "AUROC (per breast)", "value": "n/a", "95 % interval": ""} in rows


def test_unfinished_folds_are_said_to_be_so(tmp_path):
    found = evaluate.evaluate(_write_run(tmp_path, _frame(), unfinished=(1,)), resamples=20)
    assert [part["finished"] for part in found["folds"]] == [True, False, True]
    assert any("not finished in fold(s) 1" in text for text in found["warnings"])


def test_headline_has_one_row_a_figure_with_its_interval(tmp_path):
    rows = evaluate.headline(evaluate.evaluate(_write_run(tmp_path, _frame()), resamples=50))
    assert all(row.keys() == rows[0].keys() for row in rows)
    auroc = next(row for row in rows if row["figure"] == "AUROC (per breast)")
    assert 0.5 < float(auroc["value"]) < 1
    figures = [row["figure"] for row in rows]
    honest = figures.index("pF1, each fold at the others' best threshold (per breast)")
    assert figures[honest - 1] == "pF1 at the threshold that is best here (per breast)"
    assert rows[honest - 1]["95 % interval"] == "", "each resample would have another threshold"
    assert 0 < float(rows[honest]["value"]) <= float(rows[honest - 1]["value"])
    low, high = map(float, rows[honest]["95 % interval"].split(" to "))
    assert low < float(rows[honest]["value"]) < high
    assert " to " in auroc["95 % interval"]


def test_another_store_is_refused(tmp_path):
    store = fakes.make_store(tmp_path / "store")
    with pytest.raises(RunError, match="trained on another store"):
        evaluate.evaluate(_write_run(tmp_path / "run", _frame()), store, resamples=20)
    run = _write_run(tmp_path / "right", _frame(), fingerprint=store.fingerprint)
    evaluate.evaluate(run, store, resamples=20)


def test_a_table_that_was_corrected_after_training_is_what_counts(tmp_path):
    """Age and the like: the model has not seen them. Nothing else of the predictions changes by a byte."""
    frame = _frame()
    store = fakes.make_store(tmp_path / "store", frame.drop(columns=["prediction", "fold"]))
    run = _write_run(tmp_path / "run", frame.assign(age=np.nan, site_id="NA"), fingerprint=store.fingerprint)
    before = pd.read_csv(run / "fold1" / runs.VALIDATION, dtype=str, keep_default_na=False)
    with pytest.raises(RunError, match="age is unknown for all pictures"):
        evaluate.evaluate(run, resamples=20, names=["age"])
    found = evaluate.evaluate(run, store, resamples=20, names=["age"])
    assert found["covariates"] == ["age"]
    after = pd.read_csv(run / "fold1" / runs.VALIDATION, dtype=str, keep_default_na=False)
    assert (after["age"].astype(float).to_numpy() == frame.loc[frame["fold"] == 1, "age"]).all()
    assert set(after["site_id"]) == {"1", "2"}
    rest = [name for name in before if name not in ("age", "site_id")]
    assert after[rest].equals(before[rest])
    written = (run / "fold1" / runs.VALIDATION).stat().st_mtime_ns
    evaluate.evaluate(run, store, resamples=20)
    assert (run / "fold1" / runs.VALIDATION).stat().st_mtime_ns == written


def test_a_fold_is_told_from_a_run(tmp_path):
    run = _write_run(tmp_path / "run", _frame())
    with pytest.raises(RunError, match=rf"a single fold; name the run that it is of: {run}$"):
        evaluate.evaluate(run / "fold0")


def test_a_picture_held_out_twice_is_refused(tmp_path):
    frame = _frame()
    doubled = pd.concat([frame, frame[frame["fold"] == 0].assign(fold=7)])
    with pytest.raises(RunError, match="held out in two folds"):
        evaluate.evaluate(_write_run(tmp_path, doubled), resamples=20)


def test_a_run_without_predictions_says_what_to_do(tmp_path):
    runs.begin(tmp_path / "fold0", fakes.small_config(), {})
    with pytest.raises(RunError, match="no fold has finished its first epoch"):
        evaluate.evaluate(tmp_path)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("config.yaml", "a: [", "not readable as YAML"),
        ("config.yaml", "", "not readable as YAML"),
        ("validation.csv", "", "not readable as a CSV"),
        ("validation.csv", "image_id,cancer\n1,0\n", "it has no column patient_id"),
        ("environment.json", "{", "not readable as a JSON object"),
        ("environment.json", "[]", "not readable as a JSON object"),
        ("environment.json", '{"store_settings": {"levels": 5}}', "store_settings.levels: "),
        ("environment.json", '{"training": {"machines": 3}}', "training.machines: "),
    ],
)
def test_a_damaged_file_of_a_run_is_named(tmp_path, name, content, message):
    root = _write_run(tmp_path / "run", _frame())
    (root / "fold0" / name).write_text(content)
    with pytest.raises(RunError, match=rf"fold0/{name}: {message}.*train the fold again"):
        evaluate.evaluate(root)
