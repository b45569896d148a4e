"""Predictions averaged over a file's own windows: which windows, and that each counts the same."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd

from dali_pipes.plan import Draw
from dali_pipes.settings import PipelineSettings
from dali_pipes.source import choose_window
from preprocessing.convert import convert
from preprocessing.manifest import open_store
from preprocessing.synth import synthesize
from tests.training.untrained import SETTINGS, make_run
from training.inference.assemble import open_ensemble
from training.inference.predict import predict
from training.inference.windows import through_each_window, window_counts

FACTS = {
    "bits_stored": 12,
    "value_offset": 0,
    "inverted": False,
    "rescale_slope": 1.0,
    "rescale_intercept": 0.0,
    "percentile_low": 10.0,
    "percentile_high": 900.0,
    "voi_lut_first": 0,
    "voi_lut_bits": 8,
}


def _rows() -> pd.DataFrame:
    """A row with two windows, one with a LUT and a window, one with a LUT alone, one with nothing."""
    shown = [
        ([100.0, 200.0], [50.0, 60.0], ["LINEAR", "SIGMOID"], []),
        ([300.0], [70.0], ["LINEAR"], [0, 255]),
        ([], [], [], [0, 255]),
        ([], [], [], []),
    ]
    names = ("window_center", "window_width", "window_function", "voi_lut")
    return pd.DataFrame([dict(zip(names, each, strict=True)) | FACTS for each in shown], index=[5, 6, 7, 8])


def test_windows_and_luts_are_counted():
    assert window_counts(_rows(), PipelineSettings()).tolist() == [2, 2, 1, 1]
    assert window_counts(_rows(), PipelineSettings(window="percentile")).tolist() == [1, 1, 1, 1]


def test_each_is_what_the_loader_takes_at_that_place():
    rows = _rows()
    shown = through_each_window(rows, window_counts(rows, PipelineSettings()))
    assert shown.index.tolist() == [0, 1, 2, 3, 4, 5]
    places = [(5, 0), (5, 1 / 2), (6, 0), (6, 1 / 2), (7, 0), (8, 0)]
    for (before, pick), (_, after) in zip(places, shown.iterrows(), strict=True):
        wanted = choose_window(dict(rows.loc[before]), PipelineSettings(), Draw(pick=pick))
        found = choose_window(dict(after), PipelineSettings(), Draw())
        assert found[:4] == wanted[:4]
        np.testing.assert_array_equal(found[4], wanted[4])


def test_predictions_are_averaged_over_the_windows_and_a_stream_gives_the_same_bits(tmp_path: Path):
    synthesize(tmp_path, patients=1, test_patients=5, seed=5)
    convert(tmp_path / "test_images", tmp_path / "test.csv", tmp_path / "store", SETTINGS, workers=1)
    run = make_run(tmp_path / "run")
    ensemble, store = open_ensemble([run], "cpu"), open_store(tmp_path / "store")
    rows = store.manifest
    counts = window_counts(rows, PipelineSettings())
    assert set(counts) > {1}
    once, _ = ensemble.predict(store, rows)
    averaged, faults = ensemble.predict(store, rows, all_windows=True)
    assert not faults
    total = once[:, 0].copy()
    for number in range(1, counts.max()):
        more = rows[counts > number].copy()
        for name in ("window_center", "window_width", "window_function"):
            more[name] = [cells[number:] for cells in more[name]]  # synth draws no VOI LUT
        total[counts > number] += ensemble.predict(store, more.reset_index(drop=True))[0][:, 0]
    np.testing.assert_allclose(averaged[:, 0], total / counts, atol=1e-6)
    assert np.abs(averaged - once)[counts > 1].max() > 1e-4
    np.testing.assert_array_equal(averaged[counts == 1], once[counts == 1])

    source = {"csv": tmp_path / "test.csv", "device": "cpu", "all_windows": True}
    predict([run], tmp_path / "a" / "s.csv", store=tmp_path / "store", **source)
    predict([run], tmp_path / "b" / "s.csv", images=tmp_path / "test_images", workers=1, **source)
    for name in ("s.csv", "predictions_images.csv", "predictions_settings.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
