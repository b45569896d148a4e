"""Bootstrap intervals against a plain loop over patients, and what has none."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from sklearn import metrics as sk

from training.evaluation import intervals


def test_intervals_of_nothing_are_none():
    nothing = pd.DataFrame({"patient_id": ["a"], "cancer": [1.0], "prediction": [np.nan]})
    found = intervals.bootstrap(nothing, 10)
    assert found.pop("resamples") == 0
    assert {*intervals.INTERVALS, "sensitivity_at_0.9"} <= found.keys()
    assert set(found.values()) == {None}


def test_subgroups_cover_every_picture_once():
    pictures = pd.DataFrame(
        {
            "patient_id": list("aaabbb"),
            "cancer": [1.0, 0.0, 0.0, np.nan, np.nan, np.nan],
            "prediction": [0.9, 0.1, 0.2, 0.3, 0.4, 0.5],
            "machine_id": ["49", "49", "49", "", "", ""],
            "age": [45.0, 45.0, 45.0, np.nan, np.nan, np.nan],
        }
    )
    rows = intervals.subgroups(pictures, ["machine_id", "age", "absent"], threshold=0.5)
    assert [(r["group"], r["value"], r["count"]) for r in rows] == [
        ("machine_id", "49", 3),
        ("machine_id", "unknown", 0),
        ("age", "<50", 3),
        ("age", "unknown", 0),
    ]


def test_age_bands_begin_at_whole_decades():
    bands = intervals.age_bands(pd.Series([26.0, 49.99, 50, 59.9, 60, 70, 89, np.nan]))
    assert bands.tolist() == ["<50", "<50", "50-59", "50-59", "60-69", "70+", "70+", "unknown"]


def _cohort(patients, seed):
    generator = np.random.default_rng(seed)
    sick = np.repeat(generator.random(patients) < 0.3, 2).astype(float)
    return pd.DataFrame(
        {
            "patient_id": np.repeat([f"p{i}" for i in range(patients)], 2),
            "cancer": sick,
            "prediction": 1 / (1 + np.exp(-(sick + generator.normal(size=2 * patients)))),
        }
    )


def test_bootstrap_resamples_whole_patients_as_a_plain_loop_would():
    frame = _cohort(25, seed=1)
    found = intervals.bootstrap(frame, resamples=60, seed=3)
    generator = np.random.default_rng(3)
    names = frame["patient_id"].unique()
    values = []
    for _ in range(60):
        counts = generator.multinomial(len(names), np.full(len(names), 1 / len(names)))
        drawn = pd.concat(
            [frame[frame["patient_id"] == n] for n, c in zip(names, counts, strict=True) for _ in range(c)]
        )
        values.append(sk.roc_auc_score(drawn["cancer"], drawn["prediction"]))
    np.testing.assert_allclose(found["auroc"], np.percentile(values, [2.5, 97.5]), atol=1e-12)


def test_bootstrap_is_repeatable_and_wider_for_fewer_patients():
    large, small = _cohort(400, seed=2), _cohort(40, seed=2)
    first, second = intervals.bootstrap(large, 300, seed=1), intervals.bootstrap(large, 300, seed=1)
    assert first == second
    width = {name: np.ptp(intervals.bootstrap(f, 300)["auroc"]) for name, f in (("large", large), ("small", small))}
    assert width["small"] > 1.5 * width["large"]


def test_a_handful_of_patients_has_no_interval():
    frame = _cohort(60, 0)
    cancer = frame.loc[frame["cancer"] == 1, "patient_id"].unique()
    few = frame[(frame["cancer"] == 0) | frame["patient_id"].isin(cancer[:4])]
    assert intervals.bootstrap(few, 50)["auroc"] is None
    more = frame[(frame["cancer"] == 0) | frame["patient_id"].isin(cancer[:5])]
    low, high = intervals.bootstrap(more, 50)["auroc"]
    assert low < high


def test_rows_without_label_or_prediction_are_as_if_they_were_not_there():
    frame = _cohort(25, seed=1)
    more = [frame.assign(patient_id="x" + frame["patient_id"], **{name: np.nan}) for name in ("cancer", "prediction")]
    assert intervals.bootstrap(pd.concat([frame, *more]), 40) == intervals.bootstrap(frame, 40)


def test_a_lead_has_an_interval_where_some_resamples_lack_a_class():
    """Five patients of forty have cancer: about one in two hundred resamples draws none of them."""
    generator = np.random.default_rng(0)
    cancer = (np.arange(40) < 5).astype(float)
    names = {"prediction_id": [f"{row}_L" for row in range(40)], "patient_id": [str(row) for row in range(40)]}
    one, other = (pd.DataFrame({**names, "cancer": cancer, "prediction": generator.random(40)}) for _ in range(2))
    found = intervals.auroc_lead(one, other)
    low, high = found["interval"]
    assert low < found["lead"] < high


def test_a_lead_is_judged_on_the_same_patients():
    """Two models that err alike: each one's interval is wide, that of their difference is not."""
    generator = np.random.default_rng(0)
    count = 400
    cancer = (generator.random(count) < 0.3).astype(float)
    shared = cancer + generator.normal(0, 1.5, count)
    one, other = (
        pd.DataFrame(
            {
                "prediction_id": [f"{row}_L" for row in range(count)],
                "patient_id": [str(row // 2) for row in range(count)],
                "cancer": cancer,
                "prediction": 1 / (1 + np.exp(-(shared + generator.normal(0, spread, count)))),
            }
        )
        for spread in (0.1, 0.6)
    )
    found = intervals.auroc_lead(one, other)
    auroc = [sk.roc_auc_score(cancer, each["prediction"]) for each in (one, other)]
    assert found["lead"] == pytest.approx(auroc[0] - auroc[1])
    low, high = found["interval"]
    assert low < found["lead"] < high
    alone = intervals.bootstrap(one)["auroc"]
    assert high - low < (alone[1] - alone[0]) / 2
    part = intervals.auroc_lead(one, other.iloc[100:].sample(frac=1, random_state=0))
    assert part["breasts"] == 300
    assert intervals.auroc_lead(one, one)["interval"] == [0, 0]
    assert intervals.auroc_lead(one, other[cancer == 0]) is None
    assert intervals.auroc_lead(one, other.assign(patient_id="x" + other["patient_id"])) is None, "another data set's"


def test_bootstrap_without_positives_has_no_intervals():
    frame = _cohort(10, seed=1).assign(cancer=0.0)
    found = intervals.bootstrap(frame, 50)
    assert found["resamples"] == 0
    assert found["auroc"] is None
