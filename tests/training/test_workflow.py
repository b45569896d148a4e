"""What `run` does with a store that others split; tests/test_cli.py runs the whole job."""

from __future__ import annotations

import pandas as pd
import pytest

from preprocessing.errors import StoreError
from tests.training import fakes
from training import folds
from training.console import Console
from training.workflow import Steps, split


def _split(store, out, count):
    with Console(quiet=True) as console:
        split(store, fakes.small_config(f"data.folds={count}"), Steps(out / "workflow.json", console))
    return folds.read_folds(store)["fold"].nunique()


def test_folds_that_another_run_made_are_kept_and_its_own_are_made_anew(tmp_path, caplog):
    store = fakes.make_store(tmp_path / "store")
    assert _split(store, tmp_path / "a", 3) == 3
    assert _split(store, tmp_path / "b", 2) == 3
    assert "has 3 folds, and data.folds = 2 is not used" in caplog.text
    assert _split(store, tmp_path / "a", 4) == 4


def test_a_step_is_done_again_where_its_output_is_anothers(tmp_path):
    out, done = tmp_path / "submission.csv", []

    def action():
        done.append(1)
        out.write_text("ours")

    def once():
        with Console(quiet=True) as console:
            Steps(tmp_path / "workflow.json", console).once("predict", "stamp", [out], action, unchanged=True)

    once()
    once()
    assert len(done) == 1
    out.write_text("theirs")
    once()
    assert (len(done), out.read_text()) == (2, "ours")


def test_a_damaged_record_of_steps_costs_only_doing_them_again(tmp_path, caplog):
    (tmp_path / "workflow.json").write_text("{")
    with Console(quiet=True) as console:
        assert Steps(tmp_path / "workflow.json", console).known("predict") is None
    assert "workflow.json: not readable as a JSON object" in caplog.text


def test_folds_of_others_that_lack_pictures_are_left_to_the_user(tmp_path):
    store = fakes.make_store(tmp_path / "store")
    folds.make_folds(store, fakes.small_config().data)
    path = store.root / folds.FOLDS_FILE
    pd.read_csv(path, dtype=str).iloc[:-3].to_csv(path, index=False)
    before = path.read_bytes()
    with pytest.raises(StoreError, match=r"3 of the store's .* images have no fold there. Make them again with"):
        _split(store, tmp_path / "run", 2)
    assert path.read_bytes() == before
