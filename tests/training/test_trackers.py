from __future__ import annotations

import sys
import time
from types import ModuleType, SimpleNamespace

import pytest

from preprocessing.errors import ConfigError
from training.config import MonitorSettings, load_config
from training.monitor import TrainingMonitor
from training.trackers import MLflowTracker, TensorBoardTracker, WandbTracker, open_trackers


def test_tensorboard_events_can_be_read_back(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    tracker = TensorBoardTracker(tmp_path)
    tracker.log("epoch", {"auroc": 0.5}, 1)
    tracker.log("epoch", {"auroc": 0.75}, 2)
    tracker.close()
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("epoch/auroc")] == [(1, 0.5), (2, 0.75)]


def test_only_the_trackers_asked_for_are_opened(tmp_path):
    assert open_trackers(tmp_path, load_config(overrides=("monitor.tensorboard=false",))) == []
    opened = open_trackers(tmp_path, load_config())
    assert [type(tracker) for tracker in opened] == [TensorBoardTracker]
    opened[0].close()


@pytest.mark.parametrize(
    ("module", "build"),
    [("mlflow", lambda path: MLflowTracker("run", {})), ("wandb", lambda path: WandbTracker("run", path, {}))],
)
def test_a_tracker_that_is_not_installed_says_how_to_install_it(monkeypatch, tmp_path, module, build):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ConfigError, match="pip install"):
        build(tmp_path)


class FakeMlflow(ModuleType):
    """Answers like the mlflow module, within its limit of 100 parameters a call."""

    def __init__(self) -> None:
        super().__init__("mlflow")
        self.parameters, self.logged, self.begun, self.ended = {}, [], [], 0

    def start_run(self, run_id=None, run_name=None):
        self.begun.append((run_id, run_name))
        if run_id is None:
            self.parameters = {}
        return SimpleNamespace(info=SimpleNamespace(run_id=run_id or "m-1"))

    def log_params(self, parameters):
        assert len(parameters) <= 100
        assert not set(parameters) & set(self.parameters), "MLflow refuses to change a parameter"
        self.parameters |= parameters

    def log_metrics(self, figures, step, run_id):
        # Without an id MLflow begins a run of its own in a thread that has none.
        assert run_id == "m-1"
        self.logged.append((figures, step))

    def end_run(self):
        self.ended += 1


class FakeWandb(ModuleType):
    """Answers like the wandb module."""

    def __init__(self) -> None:
        super().__init__("wandb")
        self.begun, self.logged, self.ended = [], [], 0

    def init(self, *, project, name, dir, config, id, resume):
        self.begun.append((id, resume, name, config["train.lr"]))
        return SimpleNamespace(id=id or "w-1", log=self.logged.append, finish=self._finish)

    def _finish(self):
        self.ended += 1


def test_mlflow_and_wandb_get_figures_and_are_gone_on_with(monkeypatch, tmp_path):
    mlflow, wandb = FakeMlflow(), FakeWandb()
    monkeypatch.setitem(sys.modules, "mlflow", mlflow)
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    wanted = ("monitor.tensorboard=false", "monitor.mlflow=true", "monitor.wandb=true", "train.lr=0.5")
    config, folder = load_config(overrides=wanted), tmp_path / "run" / "fold0"
    folder.mkdir(parents=True)
    with TrainingMonitor(None, MonitorSettings(interval_s=60), open_trackers(folder, config)) as monitor:
        monitor.log("epoch", {"step": 3, "auroc": 0.75, "drawn": {"positive": 2}})
    for step in (3, 0):  # gone on with, then begun anew in the same folder
        for tracker in open_trackers(folder, config, step):
            tracker.close()

    figures = {"auroc": 0.75, "drawn.positive": 2.0}
    assert ({f"epoch.{name}": value for name, value in figures.items()}, 3) in mlflow.logged
    assert {f"epoch/{name}": value for name, value in figures.items()} | {"step": 3} in wandb.logged
    assert mlflow.begun == [(None, "run-fold0"), ("m-1", "run-fold0"), (None, "run-fold0")]
    assert [begun[:3] for begun in wandb.begun] == [
        (None, "allow", "run-fold0"),
        ("w-1", "allow", "run-fold0"),
        (None, "allow", "run-fold0"),
    ]
    assert wandb.begun[0][3] == 0.5
    assert mlflow.parameters["train.lr"] == "0.5"
    assert mlflow.ended == wandb.ended == 3


def test_tensorboard_hides_what_a_resumed_run_writes_again(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    first = TensorBoardTracker(tmp_path)
    for step, value in ((1, 0.5), (2, 0.6), (3, 0.7)):
        first.log("epoch", {"auroc": value}, step)
    first.close()
    time.sleep(1.1)  # event files are read in order of their names, which carry the second
    second = TensorBoardTracker(tmp_path, step=1)  # the newest checkpoint was of step 1
    second.log("epoch", {"auroc": 0.65}, 2)
    second.close()
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert [(e.step, round(e.value, 2)) for e in events.Scalars("epoch/auroc")] == [(1, 0.5), (2, 0.65)]
