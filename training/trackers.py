"""Where figures go besides metrics.jsonl: one small interface, TensorBoard by default, MLflow and W&B as extras."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from preprocessing.errors import ConfigError
from training.config import Config


class Tracker:
    """Takes figures and drops them; the base of those that keep them."""

    def log(self, kind: str, figures: Mapping[str, float], step: int) -> None:
        """Keep figures of one kind ("epoch", "step", "resources") at a step."""

    def close(self) -> None:
        """Write what is left."""


class TensorBoardTracker(Tracker):
    """TensorBoard events under `folder`."""

    def __init__(self, folder: Path) -> None:
        from torch.utils.tensorboard.writer import SummaryWriter

        self._writer = SummaryWriter(str(folder))

    def log(self, kind: str, figures: Mapping[str, float], step: int) -> None:  # noqa: D102 - as the base says
        for name, value in figures.items():
            self._writer.add_scalar(f"{kind}/{name}", value, step)

    def close(self) -> None:  # noqa: D102
        self._writer.close()


class MLflowTracker(Tracker):
    """An MLflow run, where MLFLOW_TRACKING_URI says."""

    def __init__(self, name: str, parameters: Mapping[str, Any]) -> None:
        try:
            import mlflow  # pyright: ignore[reportMissingImports] - an extra
        except ImportError:
            raise ConfigError("monitor.mlflow: needs MLflow; install it with: pip install mlflow-skinny") from None
        self._mlflow = mlflow
        mlflow.start_run(run_name=name)
        mlflow.log_params({key: str(value)[:500] for key, value in parameters.items()})

    def log(self, kind: str, figures: Mapping[str, float], step: int) -> None:  # noqa: D102
        self._mlflow.log_metrics({f"{kind}.{name}": value for name, value in figures.items()}, step=step)

    def close(self) -> None:  # noqa: D102
        self._mlflow.end_run()


class WandbTracker(Tracker):
    """A Weights & Biases run."""

    def __init__(self, name: str, folder: Path, parameters: Mapping[str, Any]) -> None:
        try:
            import wandb  # pyright: ignore[reportMissingImports] - an extra
        except ImportError:
            raise ConfigError("monitor.wandb: needs Weights & Biases; install it with: pip install wandb") from None
        self._run = wandb.init(project="mammopipe", name=name, dir=str(folder), config=dict(parameters))

    def log(self, kind: str, figures: Mapping[str, float], step: int) -> None:  # noqa: D102
        self._run.log({f"{kind}/{name}": value for name, value in figures.items()} | {"step": step})

    def close(self) -> None:  # noqa: D102
        self._run.finish()


def open_trackers(folder: Path, config: Config) -> Sequence[Tracker]:
    """The trackers that the configuration asks for, for a fold's folder.

    Raises:
        ConfigError: one is asked for whose package is not installed.
    """
    trackers: list[Tracker] = []
    name, parameters = f"{folder.parent.name}-{folder.name}", flatten(config.model_dump(mode="json"))
    if config.monitor.tensorboard:
        trackers.append(TensorBoardTracker(folder / "tensorboard"))
    if config.monitor.mlflow:
        trackers.append(MLflowTracker(name, parameters))
    if config.monitor.wandb:
        trackers.append(WandbTracker(name, folder, parameters))
    return trackers


def flatten(tree: Mapping[str, Any], path: str = "") -> dict[str, Any]:
    """A nested mapping as one level with dotted names; what is no mapping stays as it is."""
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        full = f"{path}.{name}" if path else str(name)
        flat |= flatten(value, full) if isinstance(value, Mapping) else {full: value}
    return flat


def numbers(record: Mapping[str, Any]) -> dict[str, float]:
    """The finite numbers of a record, with dotted names."""
    flat = flatten(record)
    return {name: float(v) for name, v in flat.items() if isinstance(v, (int, float)) and math.isfinite(v)}
