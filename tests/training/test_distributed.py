"""Two processes by torchrun on gloo: the same samples, the same gradients, one writer, a clean end, an exact resume."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from preprocessing.errors import ConfigError
from tests.training import fakes
from training import checkpoint, runs
from training.distributed import World, world
from training.signals import StopSignal

ROOT = Path(__file__).resolve().parents[2]
# No batch statistics, dropout or stochastic depth: what a process draws or averages by itself would differ.
# The rate is small, so that both stay where gradients can be compared: Adam makes whole steps of a tiny one's noise.
SAME = ("model.backbone=convnext_atto", "model.dropout=0", "model.drop_path=0", "train.epochs=1", "train.lr=1e-6")
TWO = "data.loader.batch_size=2"
FOUR = "data.loader.batch_size=4"


def _environment(**more):
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **more}


def _free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def _start(processes, store, out, *overrides, **environment):
    command = [sys.executable]
    if processes > 1:
        command += ["-m", "torch.distributed.run", "--nproc-per-node", str(processes)]
        command += ["--master-addr", "127.0.0.1", "--master-port", str(_free_port())]
    command += ["-m", "tests.training.fakes", str(store), str(out), *overrides]
    piped = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, cwd=ROOT, env=_environment(**environment), **piped)


def _launch(processes, store, out, *overrides, **environment):
    job = _start(processes, store, out, *overrides, **environment)
    try:
        output, errors = job.communicate(timeout=280)
    except subprocess.TimeoutExpired:
        job.kill()
        raise
    return subprocess.CompletedProcess(job.args, job.returncode, output, errors)


@pytest.fixture(scope="module")
def runs_of_one_and_two(tmp_path_factory):
    root = tmp_path_factory.mktemp("ddp")
    fakes.make_store(root / "store")
    for processes, out, batch in ((1, root / "one", FOUR), (2, root / "two", TWO)):
        done = _launch(processes, root / "store", out, *SAME, batch, SERVED=str(root / f"served{processes}"))
        assert done.returncode == 0, done.stderr[-3000:]
    return root


def _served(root, processes):
    """Rows of each step, all ranks together."""
    steps = {}
    for path in sorted(root.glob(f"served{processes}-*")):
        for line in path.read_text().splitlines():
            epoch, step, rows = json.loads(line)
            steps.setdefault((epoch, step), []).extend(rows)
    return {step: sorted(rows) for step, rows in steps.items()}


@pytest.mark.slow
@pytest.mark.xdist_group("ddp")
def test_two_processes_see_the_samples_of_one_at_the_same_global_batch(runs_of_one_and_two):
    one, two = _served(runs_of_one_and_two, 1), _served(runs_of_one_and_two, 2)
    assert len(one) == 12
    assert one == two


@pytest.mark.slow
@pytest.mark.xdist_group("ddp")
def test_two_processes_have_the_gradients_of_one(runs_of_one_and_two):
    _assert_same_gradients(runs_of_one_and_two / "one", runs_of_one_and_two / "two")


def _assert_same_gradients(one, other):
    """Adam's first moments are running means of the gradients themselves, so an error of a factor shows too."""
    moments = [checkpoint.newest(run / "fold0" / "checkpoints")[0]["optimizer"]["state"] for run in (one, other)]
    assert moments[0].keys() == moments[1].keys()
    assert all(int(state["step"]) == 12 for state in moments[1].values())
    largest = max(state["exp_avg"].abs().max().item() for state in moments[0].values())
    for number, state in moments[0].items():
        torch.testing.assert_close(
            moments[1][number]["exp_avg"], state["exp_avg"], rtol=0.01, atol=1e-4 * largest, msg=str(number)
        )


@pytest.mark.slow
@pytest.mark.xdist_group("ddp")
def test_one_process_writes_and_validation_covers_every_picture_once(runs_of_one_and_two):
    one, two = (runs.open_run(runs_of_one_and_two / name).folds[0] for name in ("one", "two"))
    assert len(two.records("epoch")) == 1
    assert two.environment.processes == 2
    assert two.validation["image_id"].tolist() == one.validation["image_id"].tolist()
    difference = (two.validation["prediction"] - one.validation["prediction"]).abs()
    assert difference.max() < 0.02
    assert two.records("epoch")[0]["val_loss"] == pytest.approx(one.records("epoch")[0]["val_loss"], rel=0.05)


@pytest.mark.slow
@pytest.mark.xdist_group("ddp")
def test_a_killed_rank_ends_the_job_and_another_number_of_ranks_continues(runs_of_one_and_two, tmp_path):
    store, overrides = runs_of_one_and_two / "store", (*SAME, "train.checkpoint_steps=2")
    done = _launch(2, store, tmp_path, *overrides, TWO, KILL_AT="step 7", KILL_RANK="1")
    assert done.returncode not in (0, -signal.SIGKILL)
    state, _ = checkpoint.newest(tmp_path / "fold0" / "checkpoints")
    assert 0 < state["position"]["step"] < 12
    assert not list((tmp_path / "fold0").glob("summary.json"))
    done = _launch(1, store, tmp_path, *overrides, FOUR)
    assert done.returncode == 0, done.stderr[-3000:]
    fold = runs.open_run(tmp_path).folds[0]
    assert fold.finished
    _assert_same_gradients(runs_of_one_and_two / "one", tmp_path)


@pytest.mark.slow
@pytest.mark.xdist_group("ddp")
def test_with_more_ranks_the_schedule_ends_at_its_end_and_checkpoints_are_the_newest(runs_of_one_and_two, tmp_path):
    store, overrides = runs_of_one_and_two / "store", (*SAME, "train.checkpoint_steps=2", "train.min_lr=1e-7")
    assert _launch(1, store, tmp_path, *overrides, TWO, KILL_AT="step 9").returncode
    before, _ = checkpoint.newest(tmp_path / "fold0" / "checkpoints")
    assert before["position"]["batch"] == before["position"]["step"] == 8
    done = _launch(2, store, tmp_path, *overrides, TWO)
    assert done.returncode == 0, done.stderr[-3000:]
    state, _ = checkpoint.newest(tmp_path / "fold0" / "checkpoints")
    assert (state["position"]["epoch"], state["position"]["step"]) == (1, 8 + state["position"]["batches"] - 4)
    (record,) = runs.open_run(tmp_path).folds[0].records("epoch")
    assert record["lr"] == pytest.approx(1e-7)


@pytest.mark.slow
@pytest.mark.xdist_group("ddp")
def test_all_folds_are_trained_in_one_call(tmp_path):
    """Also those that nobody has made yet."""
    fakes.make_store(tmp_path / "store")
    done = _launch(2, tmp_path / "store", tmp_path / "run", *SAME, TWO, "train.max_steps=2", FOLDS="all")
    assert done.returncode == 0, done.stderr[-3000:]
    assert [fold.fold for fold in runs.open_run(tmp_path / "run").folds if fold.finished] == [0, 1]


@pytest.mark.slow
@pytest.mark.xdist_group("ddp")
@pytest.mark.parametrize(("batches", "epoch"), [(1, 0), (12, 0)], ids=["training", "validation"])
def test_ranks_of_slow_steps_leave_together_before_torchrun_kills_them(runs_of_one_and_two, tmp_path, batches, epoch):
    slow = {"SERVED": str(tmp_path / "served"), "SLOW_FROM": str(batches)}
    job = _start(2, runs_of_one_and_two / "store", tmp_path / "run", *SAME, TWO, **slow)
    log = tmp_path / "served-0"
    deadline = time.monotonic() + 120
    while not (log.exists() and len(log.read_text().splitlines()) >= batches) and time.monotonic() < deadline:
        time.sleep(0.1)
    time.sleep(2)  # the next batch takes five seconds to come
    job.send_signal(signal.SIGTERM)
    _, errors = job.communicate(timeout=100)
    assert errors.count("Stopped by SIGTERM") == 1, errors[-3000:]
    state, _ = checkpoint.newest(tmp_path / "run" / "fold0" / "checkpoints")
    assert (state["position"]["epoch"], state["position"]["batch"]) == (epoch, min(batches + 1, 12))
    done = _launch(2, runs_of_one_and_two / "store", tmp_path / "run", *SAME, TWO)
    assert done.returncode == 0, done.stderr[-3000:]
    _assert_same_gradients(runs_of_one_and_two / "two", tmp_path / "run")
    fold, whole = (runs.open_run(run).folds[0] for run in (tmp_path / "run", runs_of_one_and_two / "two"))
    assert fold.finished
    assert fold.records("epoch")[0]["train_loss"] == pytest.approx(whole.records("epoch")[0]["train_loss"], rel=1e-5)


def test_a_signal_during_an_exchange_is_for_the_next_one(monkeypatch):
    sent = []

    class Other(World):
        def max(self, value):
            if not sent:
                sent.append(os.getpid())
                os.kill(os.getpid(), signal.SIGTERM)
            return value

    monkeypatch.setattr(signal, "raise_signal", sent.append)
    with StopSignal() as stop:
        assert stop.agreed(Other(0, 2), due=True) == (False, True)
        assert stop.agreed(Other(0, 2)) == (True, False)
        assert stop.status == 128 + signal.SIGTERM
    assert sent == [os.getpid(), signal.SIGTERM]


def test_a_sigterm_that_torchrun_passes_on_is_no_second_one(monkeypatch):
    """A batch system sends it to all, and torchrun's agent once more to its processes."""
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    sent = []
    monkeypatch.setattr(signal, "raise_signal", sent.append)
    before = signal.signal(signal.SIGTERM, lambda *_: pytest.fail("it ended the process"))
    try:
        with StopSignal() as stop:
            for _ in range(3):
                os.kill(os.getpid(), signal.SIGTERM)
            assert stop.agreed(World()) == (True, False)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert sent == [signal.SIGTERM]


def test_one_process_alone_exchanges_nothing(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with world() as place:
        assert place == World()
        assert place.is_main
        value = torch.tensor(3.0)
        assert place.sum(value) is value
        assert place.gather("x") == ["x"]
        place.barrier()
        assert not torch.distributed.is_initialized()


def test_an_environment_left_over_from_torchrun_is_named(monkeypatch):
    for name, value in (("WORLD_SIZE", "2"), ("RANK", "0")):
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    with pytest.raises(ConfigError, match="WORLD_SIZE is 2 in the environment, but MASTER_ADDR is not"), world():
        pass
