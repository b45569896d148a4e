"""Checkpoints: sound or refused, and a killed run that ends bit-equal to one that was left alone."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from preprocessing.errors import RunError
from tests.training import fakes
from training import checkpoint, run_files, runs

ROOT = Path(__file__).resolve().parents[2]


def _state(step):
    return {"model": {"w": torch.arange(1000.0) + step}, "position": {"step": step}, "ema": None}


def _save(folder, step, keep=2):
    return checkpoint.save(folder, _state(step), {"step": step, "epoch": 0}, keep)


# ---- one checkpoint


def test_what_was_saved_comes_back(tmp_path):
    path = _save(tmp_path, 7)
    state, described = checkpoint.load(path)
    assert torch.equal(state["model"]["w"], _state(7)["model"]["w"])
    assert state["position"] == {"step": 7}
    assert described["step"] == 7


def test_only_the_latest_are_kept(tmp_path):
    for step in (1, 2, 10, 11):
        _save(tmp_path, step, keep=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "step-00000010.json",
        "step-00000010.pt",
        "step-00000011.json",
        "step-00000011.pt",
    ]


@pytest.mark.parametrize("keep", [1, 2])
def test_a_save_outlives_later_steps_that_were_never_finished(tmp_path, keep):
    """Killed in two saves, the run goes on from the step before them and does not save at the same steps again."""
    _save(tmp_path, 100, keep)
    for step in (150, 170):
        (tmp_path / f"step-{step:08d}.pt").write_bytes(b"half")
    path = _save(tmp_path, 130, keep)
    found = checkpoint.newest(tmp_path)
    assert found is not None
    assert found[1]["step"] == 130
    there = sorted(each.name for each in tmp_path.glob("*.pt"))
    assert there == ["step-00000100.pt", path.name][-keep:]


def test_leftovers_of_a_killed_save_are_cleared_away(tmp_path):
    (tmp_path / ".step-00000001.pt.999.tmp").write_bytes(b"x" * 100)
    _save(tmp_path, 2)
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("byte", [0, 200, 2000, -1])
def test_any_flipped_bit_is_noticed(tmp_path, byte):
    path = _save(tmp_path, 1)
    data = bytearray(path.read_bytes())
    data[byte] ^= 4
    path.write_bytes(bytes(data))
    with pytest.raises(RunError, match="damaged"):
        checkpoint.load(path)


@pytest.mark.parametrize("damage", ["flip", "cut", "empty", "no json", "bad json", "version"])
def test_a_damaged_newest_is_named_and_the_one_before_used(tmp_path, caplog, damage):
    _save(tmp_path, 1)
    path = _save(tmp_path, 2)
    beside, data = path.with_suffix(".json"), bytearray(path.read_bytes())
    if damage == "flip":
        data[len(data) // 2] ^= 1
        path.write_bytes(bytes(data))
    elif damage in ("cut", "empty"):
        path.write_bytes(bytes(data[: len(data) // 2]) if damage == "cut" else b"")
    elif damage == "no json":
        beside.unlink()
    else:
        text = beside.read_text()
        beside.write_text(text[:20] if damage == "bad json" else text.replace('"version": 1', '"version": 99'))
    found = checkpoint.newest(tmp_path)
    assert found is not None
    assert found[1]["step"] == 1
    assert "step-00000002" in caplog.text


def test_all_damaged_is_an_error_and_none_at_all_is_none(tmp_path):
    assert checkpoint.newest(tmp_path) is None
    _save(tmp_path, 1).write_bytes(b"")
    with pytest.raises(RunError, match="none of its 1 checkpoints is sound"):
        checkpoint.newest(tmp_path)


def test_code_in_a_checkpoint_is_never_run(tmp_path):
    marker = tmp_path / "ran"

    class Evil:
        def __reduce__(self):
            return (Path.touch, (marker,))

    path = checkpoint.save(tmp_path, {"model": Evil()}, {"step": 1}, 1)
    with pytest.raises(Exception, match=r"[Ww]eights"):
        checkpoint.load(path)
    assert not marker.exists()


def test_a_full_disk_is_one_line_and_leaves_the_checkpoints_before(tmp_path, monkeypatch):
    _save(tmp_path, 1)

    def full(path, data):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "write_atomically", full)
    for step in (2, 1):  # a run that ended in a validation saves its step once more
        with pytest.raises(RunError, match=rf"step-0000000{step}\.pt: the checkpoint of .* bytes .*No space left"):
            _save(tmp_path, step)
        assert checkpoint.newest(tmp_path)[1]["step"] == 1


def test_differences_leave_out_what_does_not_change_the_result():
    saved = {"train": {"lr": 1, "device": "cpu"}, "monitor": {"interval_s": 1}, "data": {"loader": {"threads": 1}}}
    wanted = {"train": {"lr": 2, "device": "cuda"}, "monitor": {"interval_s": 9}, "data": {"loader": {"cache": "x"}}}
    assert checkpoint.differences(saved, wanted) == ["train.lr: 1 there, 2 now"]
    assert checkpoint.differences({}, {"train": {"lr": 2, "device": "cpu"}}) == ["train.lr: absent there, 2 now"]


# ---- a killed run


OVERRIDES = (
    "train.epochs=3",
    "train.checkpoint_steps=2",
    "train.ema_decay=0.9",
    "train.patience=9",
    "train.accumulate=2",
)


def _train(store, out, *overrides, kill_at=None, check=True):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    if kill_at:
        environment["KILL_AT"] = kill_at
    command = [sys.executable, "-m", "tests.training.fakes", str(store), str(out), *OVERRIDES, *overrides]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240, check=False)
    if check and not kill_at:
        assert done.returncode == 0, done.stderr
    return done


def _outcome(out):
    """Everything that two runs must share to the bit."""
    fold = runs.open_run(out).folds[0]
    state, _ = checkpoint.newest(fold.folder / "checkpoints")
    records = [
        {
            key: value
            for key, value in record.items()
            if key not in ("seconds", "images_per_s", "wait_share", "memory_mb")
        }
        for record in fold.records("epoch")
    ]
    return state, load_file(fold.best), records, (fold.folder / "validation.csv").read_bytes()


def _assert_equal(one, other, path=""):
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, other), path
    elif isinstance(one, dict):
        assert one.keys() == other.keys(), path
        for key in one:
            if key != "seconds":
                _assert_equal(one[key], other[key], f"{path}/{key}")
    elif isinstance(one, list):
        assert len(one) == len(other), path
        for number, (first, second) in enumerate(zip(one, other, strict=True)):
            _assert_equal(first, second, f"{path}/{number}")
    else:
        assert one == other or (one != one and other != other), path  # noqa: PLR0124 - NaN


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    root = tmp_path_factory.mktemp("resume")
    fakes.make_store(root / "store")
    _train(root / "store", root / "whole")
    return root


# Steps 1 to 6 are the first epoch's: mid-epoch, between checkpoints, in a save (weights there, JSON not), at an end.
@pytest.mark.slow
@pytest.mark.xdist_group("resume")
@pytest.mark.parametrize("moments", [("step 3", "step 9"), ("save 2",), ("epoch-end 1", "save 1")])
def test_a_killed_run_ends_bit_equal_to_one_left_alone(uninterrupted, tmp_path, moments):
    for moment in moments:
        done = _train(uninterrupted / "store", tmp_path, kill_at=moment)
        assert done.returncode == -signal.SIGKILL, done.stderr
    _train(uninterrupted / "store", tmp_path)
    for one, other in zip(_outcome(uninterrupted / "whole"), _outcome(tmp_path), strict=True):
        _assert_equal(one, other)


@pytest.mark.slow
@pytest.mark.xdist_group("resume")
def test_sigterm_saves_where_it_stands_and_resuming_ends_bit_equal(uninterrupted, tmp_path):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "SLOW": "0.05"}
    store = str(uninterrupted / "store")
    command = [sys.executable, "-m", "tests.training.fakes", store, str(tmp_path), *OVERRIDES]
    with subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as child:
        folder = tmp_path / "fold0" / "checkpoints"
        deadline = time.monotonic() + 120
        while not list(folder.glob("*.json")) and time.monotonic() < deadline:
            time.sleep(0.02)
        child.send_signal(signal.SIGTERM)
        _, errors = child.communicate(timeout=120)
    assert child.returncode == 128 + signal.SIGTERM, errors
    assert b"Traceback" not in errors
    _train(store, tmp_path)
    for one, other in zip(_outcome(uninterrupted / "whole"), _outcome(tmp_path), strict=True):
        _assert_equal(one, other)


def test_a_resumed_run_is_served_the_very_next_batches(tmp_path, monkeypatch):
    """Mid-epoch: the order of samples over both halves is that of a whole run."""
    from training import fit, session

    torch.set_num_threads(1)
    fakes.use_fakes(monkeypatch)
    store = fakes.make_store(tmp_path / "store")
    config = fakes.small_config("train.epochs=2")
    fit.fit(config, store, 0, tmp_path / "whole")
    whole = list(fakes.FakeLoader.served)
    fakes.FakeLoader.served.clear()
    original = session.Session._after_step

    def stop_at_five(self, at, guard):
        if at.step == 5:
            os.kill(os.getpid(), signal.SIGTERM)
        original(self, at, guard)

    with monkeypatch.context() as patch:
        patch.setattr(session.Session, "_after_step", stop_at_five)
        with pytest.raises(SystemExit):
            fit.fit(config, store, 0, tmp_path / "half")
    fit.fit(config, store, 0, tmp_path / "half", resume=True)
    assert fakes.FakeLoader.served == whole
    for name in ("validation.csv",):
        assert (tmp_path / "half/fold0" / name).read_bytes() == (tmp_path / "whole/fold0" / name).read_bytes()
    steps = [record["step"] for record in runs.open_run(tmp_path / "half").folds[0].records("epoch")]
    assert steps == [12, 24]


def test_records_after_the_checkpoint_are_forgotten_on_resuming(tmp_path):
    path = tmp_path / "metrics.jsonl"
    lines = [{"kind": kind, "epoch": step // 6 - 1, "step": step} for step in (6, 12, 18) for kind in ("step", "epoch")]
    path.write_text("\n".join(map(json.dumps, lines)) + '\n{"kind": "ep')
    run_files.drop_records_after(path, 2, 12)
    assert [record["step"] for record in run_files.read_records(path)] == [6, 6, 12, 12]
    run_files.drop_records_after(path, 1, 12)  # saved with an epoch's batches used and its validation to come
    assert [(record["kind"], record["step"]) for record in run_files.read_records(path)][2:] == [("step", 12)]


def test_seeds_of_steps_differ_and_follow_from_the_position():
    from training.loop import step_seed

    seeds = {step_seed(s, e, b, r) for s in range(3) for e in range(5) for b in range(20) for r in range(2)}
    assert len(seeds) == 600
    assert step_seed(1, 2, 3, 0) == step_seed(1, 2, 3, 0)
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert np.std([seed / 2**63 for seed in seeds]) > 0.2
