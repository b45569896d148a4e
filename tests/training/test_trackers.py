from __future__ import annotations

import sys

import pytest

from preprocessing.errors import ConfigError
from training.config import load_config
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
