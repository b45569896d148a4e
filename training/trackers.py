"""Where figures go besides metrics.jsonl: one small interface, TensorBoard by default, MLflow and W&B as extras."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from preprocessing.errors import ConfigError
from training import run_files
from training.config import Config


class Tracker:
    """Takes figures and drops them; the base of those that keep them."""

    def log(self, kind: str, figures: Mapping[str, float], step: int) -> None:
        """Keep figures of one kind ("epoch", "step", "resources") at a step."""

    def close(self) -> None:
        """Write what is left."""


class TensorBoardTracker(Tracker):
    """TensorBoard events under `folder`. A run that goes on at `step` hides what was written after it before."""

    def __init__(self, folder: Path, step: int = 0) -> None:
        from torch.utils.tensorboard.writer import SummaryWriter

        self._writer = SummaryWriter(str(folder), purge_step=step + 1 if step else None)

    def log(self, kind: str, figures: Mapping[str, float], step: int) -> None:  # noqa: D102 - as the base says
        for name, value in figures.items():
            self._writer.add_scalar(f"{kind}/{name}", value, step)

    def close(self) -> None:  # noqa: D102
        self._writer.close()


class MLflowTracker(Tracker):
    """An MLflow run, where MLFLOW_TRACKING_URI says."""

    def __init__(self, name: str, parameters: Mapping[str, Any], identity: str | None = None) -> None:
        """`identity`: of the run to go on with; a new one begins without it."""
        try:
            import mlflow  # pyright: ignore[reportMissingImports] - an extra
        except ImportError:
            raise ConfigError("monitor.mlflow: needs MLflow; install it with: pip install mlflow-skinny") from None
        self._mlflow = mlflow
        self.identity: str = mlflow.start_run(run_id=identity, run_name=name).info.run_id
        if identity is None:
            cells = [(key, str(value)[:500]) for key, value in parameters.items()]
            for start in range(0, len(cells), 100):  # the most that its API takes at once
                mlflow.log_params(dict(cells[start : start + 100]))

    def log(self, kind: str, figures: Mapping[str, float], step: int) -> None:  # noqa: D102
        # With its id: MLflow's active run is the thread's, and the monitor's thread logs too.
        named = {f"{kind}.{name}": value for name, value in figures.items()}
        self._mlflow.log_metrics(named, step=step, run_id=self.identity)

    def close(self) -> None:  # noqa: D102
        self._mlflow.end_run()


class WandbTracker(Tracker):
    """A Weights & Biases run."""

    def __init__(self, name: str, folder: Path, parameters: Mapping[str, Any], identity: str | None = None) -> None:
        """`identity`: of the run to go on with; a new one begins without it."""
        try:
            import wandb  # pyright: ignore[reportMissingImports] - an extra
        except ImportError:
            raise ConfigError("monitor.wandb: needs Weights & Biases; install it with: pip install wandb") from None
        folder.mkdir(parents=True, exist_ok=True)
        self._run = wandb.init(
            project="mammopipe", name=name, dir=str(folder), config=dict(parameters), id=identity, resume="allow"
        )
        self.identity: str = self._run.id

    def log(self, kind: str, figures: Mapping[str, float], step: int) -> None:  # noqa: D102
        self._run.log({f"{kind}/{name}": value for name, value in figures.items()} | {"step": step})

    def close(self) -> None:  # noqa: D102
        self._run.finish()


def open_trackers(folder: Path, config: Config, step: int = 0) -> Sequence[Tracker]:
    """The trackers that the configuration asks for.

    Args:
        folder: of a fold. `trackers.json` there keeps what MLflow and W&B call the run, for when it goes on.
        config: says which.
        step: where a run goes on; 0 for a new one.

    Raises:
        ConfigError: one is asked for whose package is not installed.
    """
    trackers: list[Tracker] = []
    name, parameters = f"{folder.parent.name}-{folder.name}", flatten(config.model_dump(mode="json"))
    path = folder / "trackers.json"
    again = "Remove it, and the trackers begin another run."
    known = run_files.read_json(path, again) if step and path.is_file() else {}
    named: dict[str, MLflowTracker | WandbTracker] = {}
    if config.monitor.mlflow:
        named["mlflow"] = MLflowTracker(name, parameters, known.get("mlflow"))
    if config.monitor.wandb:
        named["wandb"] = WandbTracker(name, folder, parameters, known.get("wandb"))
    if named:
        folder.mkdir(parents=True, exist_ok=True)
        run_files.write_json(path, {kind: tracker.identity for kind, tracker in named.items()})
    if config.monitor.tensorboard:  # writes at once, so only after the others have found their packages
        trackers.append(TensorBoardTracker(folder / "tensorboard", step))
    return [*trackers, *named.values()]


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
