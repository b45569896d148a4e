import numpy as np
import pandas as pd
import pytest
from pydantic import ValidationError

from dali_pipes.plan import Plan
from dali_pipes.sampling import hard_rows, row_weights
from dali_pipes.settings import LoaderSettings
from preprocessing.errors import InputError

ROWS = pd.DataFrame({"image_id": ["a", "b", "c", "d"], "w": [1.0, 2.0, 3.0, 4.0], "cancer": [1.0, 0, 0, 0]})
LABELS = np.array([1.0] * 20 + [0.0] * 980)


def test_weighted_sampling_follows_the_column():
    settings = LoaderSettings(sampling="weighted", weight_column="w", epoch_samples=40_000)
    order = Plan(np.zeros(4), settings, 1, True, weights=row_weights(ROWS, settings)).order(0)
    assert np.abs(np.bincount(order) / 40_000 - np.array([0.1, 0.2, 0.3, 0.4])).max() < 0.01


@pytest.mark.parametrize("values", [[1, 2, 3, 0], [1, 2, 3, "x"], [1, 2, 3, np.nan]])
def test_weights_that_are_no_numbers_above_0_are_named(values):
    with pytest.raises(InputError, match="image d"):
        row_weights(ROWS.assign(w=values), LoaderSettings(sampling="weighted", weight_column="w"))


def test_an_unknown_weight_column_is_named():
    with pytest.raises(InputError, match="weight_column = v"):
        row_weights(ROWS, LoaderSettings(sampling="weighted", weight_column="v"))


@pytest.mark.parametrize("unused", [{"weight_column": "w"}, {"hard_negatives": "h.csv", "sampling": "weighted"}])
def test_what_the_sampling_does_not_use_is_refused(unused):
    with pytest.raises(
        ValidationError, match=r"(weight_column needs sampling = 'weighted'|hard_negatives needs .*'balanced')"
    ):
        LoaderSettings(**unused)


def test_hard_negatives_have_their_share_of_a_balanced_epochs_negatives():
    hard = np.zeros(1000, bool)
    hard[[0, *range(100, 110)]] = True  # a positive in the list stays what it is
    settings = LoaderSettings(positive_share=0.5, hard_negative_share=0.4, epoch_samples=1000)
    plan = Plan(LABELS, settings, 1, True, hard=hard)
    counts = np.bincount(plan.order(0), minlength=1000)
    assert counts[:20].sum() == 500
    assert counts[100:110].sum() == 200
    assert np.ptp(counts[100:110]) <= 1
    first = plan.order(0)[:500]
    assert 70 < np.isin(first, np.arange(100, 110)).sum() < 130, "all over the epoch"


def test_the_list_of_hard_negatives_is_a_csv_of_image_ids(tmp_path, caplog):
    path = tmp_path / "hard.csv"
    settings = LoaderSettings(hard_negatives=str(path))
    with pytest.raises(InputError, match="no such file"):
        hard_rows(ROWS, settings)
    path.write_text("image\nb\n")
    with pytest.raises(InputError, match="found image"):
        hard_rows(ROWS, settings)
    for content in (b"image_id\n\xff\xfe\n", b'image_id\n"b\n', b"PK\3\4"):
        path.write_bytes(content)
        with pytest.raises(InputError, match=r"hard\.csv: "):
            hard_rows(ROWS, settings)
    for content in ("image_id\nb\nz\n", "note; image_id \nx; b \n\n"):
        path.write_text(content)
        assert hard_rows(ROWS, settings).tolist() == [False, True, False, False]
    assert not caplog.text
    for listed in ("y\nz", "a\nz"):  # unknown; a positive
        caplog.clear()
        path.write_text(f"image_id\n{listed}\n")
        hard_rows(ROWS, settings)
        assert "none of its 2 image_ids is of a negative picture" in caplog.text


@pytest.mark.parametrize("sampling", ["natural", "balanced"])
def test_with_replacement_some_come_twice_and_shares_stay(sampling):
    settings = LoaderSettings(sampling=sampling, replacement=True, positive_share=0.3)
    plan = Plan(LABELS, settings, 1, True)
    counts = np.bincount(plan.order(0), minlength=1000)
    assert counts[20:].max() > 1
    assert (counts == 0).any()
    if sampling == "balanced":
        assert counts[:20].sum() == 300
