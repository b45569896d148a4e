"""A run folder: the names of its files, opening it, and the model that it holds.

docs/architecture.md says what each file is. One fold's part is `RUN/foldK`; a run is all of those there.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from preprocessing.errors import ConfigError, RunError, command_line
from preprocessing.files import claimed, write_atomically
from preprocessing.manifest import Store
from training import run_files
from training.config import Config, checked, dump
from training.run_files import Environment

if TYPE_CHECKING:
    import torch

    from training.model import MammoModel

CONFIG = "config.yaml"
ENVIRONMENT = "environment.json"
RECORDS = "metrics.jsonl"
VALIDATION = "validation.csv"
SUMMARY = "summary.json"
CHECKPOINTS = "checkpoints"
BEST = "checkpoints/best.safetensors"
METRICS = "metrics.json"

# What a table says of a picture beside what the model is trained on: it may be corrected later.
FACTS = ("site_id", "machine_id", "age", "density", "implant")


@dataclass(frozen=True)
class FoldRun:
    """One fold's part of a run, finished or not."""

    folder: Path
    fold: int

    @cached_property
    def config(self) -> Config:
        """The configuration that it was trained with."""
        # Not load_config: debug mode would lay its values over the saved ones again.
        path = self.folder / CONFIG
        return checked(Config, run_files.read_config(path), where=str(path))

    @cached_property
    def environment(self) -> Environment:
        """What environment.json says: versions, device, store, fold, command.

        Raises:
            RunError: it is missing or damaged.
        """
        return run_files.read_environment(self.folder / ENVIRONMENT)

    @property
    def finished(self) -> bool:
        """Whether training came to its end."""
        return (self.folder / SUMMARY).is_file()

    @property
    def best(self) -> Path:
        """The best model's weights, safetensors."""
        return self.folder / BEST

    @cached_property
    def validation(self) -> pd.DataFrame:
        """The best epoch's predictions on the fold's own pictures, one row a picture.

        Raises:
            RunError: there are none yet, or the file is damaged.
        """
        return run_files.read_validation(self.folder / VALIDATION, self.fold)

    def records(self, kind: str) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl of one kind; a last line cut off by a crash is passed over."""
        return [each for each in run_files.read_records(self.folder / RECORDS) if each.get("kind") == kind]


@dataclass(frozen=True)
class Run:
    """A run: its folder and the folds found there, by number."""

    root: Path
    folds: tuple[FoldRun, ...]


def open_run(root: str | Path) -> Run:
    """Open a run folder.

    Raises:
        RunError: there is no folder, or no fold in it.
    """
    root = Path(root)
    if not root.is_dir():
        raise RunError(f"{root}: no run there. Train one with: {command_line(f'train --out {root}')}")
    found = {int(m[1]): path for path in root.iterdir() if (m := re.fullmatch(r"fold(\d+)", path.name))}
    folds = tuple(FoldRun(path, fold) for fold, path in sorted(found.items()) if (path / CONFIG).is_file())
    if not folds and (root / CONFIG).is_file():
        raise RunError(f"{root}: a single fold; name the run that it is of: {root.parent}")
    if not folds:
        raise RunError(f"{root}: no trained fold there (fold0 and so on). Train one with: train --out {root}")
    return Run(root, folds)


def folds_of(folder: Path) -> list[FoldRun]:
    """The folds that a folder stands for: those of a run (`runs/NAME`), or itself (`runs/NAME/foldK`).

    Raises:
        RunError: there is no run.
    """
    number = re.fullmatch(r"fold(\d+)", folder.name)
    if number and (folder / CONFIG).is_file():
        return [FoldRun(folder, int(number[1]))]
    return list(open_run(folder).folds)


def held_out(folds: Sequence[FoldRun], where: str | Path) -> pd.DataFrame:
    """Validation predictions of folds of one split, a row a picture; `where` is named in errors.

    Raises:
        RunError: a picture was held out in two of them.
    """
    frame = pd.concat([fold.validation for fold in folds], ignore_index=True)
    doubled = frame["image_id"].duplicated()
    if doubled.any():
        raise RunError(
            f"{where}: picture {frame.loc[doubled, 'image_id'].iloc[0]} was held out in two folds, so the folds "
            "were not trained on the same split; train them into a new folder."
        )
    return frame


def continues(folder: Path, config: Config, store: Store) -> bool:
    """Whether a fold's folder is there and was begun with this configuration and store."""
    try:
        return (folder / CONFIG).is_file() and not mismatch(folder, config, store)
    except ConfigError:  # settings of another version
        return False


def mismatch(folder: Path, config: Config, store: Store) -> list[str]:
    """What this configuration and store differ in from those that a fold's folder was begun with."""
    begun = FoldRun(folder, 0)
    saved, wanted = (each.model_dump(mode="json") for each in (begun.config, config))
    environment = begun.environment
    # More processes with smaller batches are the same training as long as the global batch is.
    was, now = saved["data"]["loader"], wanted["data"]["loader"]
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    if was["batch_size"] * environment.processes == now["batch_size"] * processes:
        was["batch_size"] = now["batch_size"]
    if saved["train"].get("auto_batch") and wanted["train"]["auto_batch"]:  # the size that was found stays
        was["batch_size"] = now["batch_size"]
    # They bring torch and scikit-learn, which those that only read or watch a run do without.
    from training import checkpoint
    from training.environment import EXTRA, facts_trained_on
    from training.folds import held_out_digest

    found = checkpoint.differences(saved, wanted)
    begun_on = environment.store_fingerprint
    if not store.is_known_as(begun_on):
        found.append(f"store: fingerprint {str(begun_on)[:12]} there, {store.fingerprint[:12]} now ({store.root})")
    elif environment.held_out not in (None, held_out_digest(store, environment.fold)):
        found.append(f"folds: fold {environment.fold} of {store.root} now holds out different pictures")
    begun_with, now_there = environment.facts_read, facts_trained_on(store, config)
    if begun_with.get(EXTRA) != now_there.get(EXTRA):
        found.append("data.extra_stores: other pictures there than it was begun with, or in another order")
    both = (begun_with.keys() & now_there.keys()) - {EXTRA}
    changed = sorted(name for name in both if begun_with[name] != now_there[name])
    beside = ", or one of data.extra_stores" if config.data.extra_stores else ""
    for name in changed:
        listed = name == "hard_negatives"
        told = f"{config.data.loader.hard_negatives} lists other pictures than it did"
        found.append(f"{name}: {told if listed else f'{store.root} has other values there than it had{beside}'}")
    return found


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold a fold's folder, made if need be, for one training. The lock ends with the process, however that ends; a
    folder that nothing else came into is gone then.

    Raises:
        RunError: another training holds it.
    """
    busy = f"{folder}: another training is writing there. Wait for it to end, or take another --out."
    with claimed(folder, RunError(busy)):
        yield


def begin(folder: Path, config: Config, environment: dict[str, Any]) -> None:
    """Make a fold's folder; its configuration is written last, so a folder with one is whole."""
    (folder / CHECKPOINTS).mkdir(parents=True, exist_ok=True)
    run_files.write_json(folder / ENVIRONMENT, environment)
    write_atomically(folder / CONFIG, dump(config).encode())


def save_best(folder: Path, model: MammoModel, described: dict[str, Any]) -> None:
    """Publish a fold's best model: safetensors whose header holds what it is and a hash of its tensors.

    One file, replaced in one go: weights and description cannot be of two epochs. The JSON beside it is for people.
    """
    from safetensors.torch import save

    state = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    described = run_files.plain({**described, "sha256": _hash(state)})
    write_atomically(folder / BEST, save(state, metadata={"mammopipe": json.dumps(described)}))
    run_files.write_json((folder / BEST).with_suffix(".json"), described)


def load_model(fold: FoldRun, device: torch.device | str = "cpu") -> tuple[MammoModel, dict[str, Any]]:
    """The fold's best model in evaluation mode, and what is known of it (epoch, step, metrics).

    Raises:
        RunError: no model yet, or a damaged one.
    """
    import torch
    from safetensors import SafetensorError, safe_open

    from training.model import build_model

    if not fold.best.is_file():
        raise RunError(
            f"{fold.best}: not there yet; the fold has not finished its first epoch. Train it with --resume."
        )
    try:
        with safe_open(fold.best, framework="pt") as file:
            described = dict(json.loads(file.metadata()["mammopipe"]))
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
    except (SafetensorError, KeyError, TypeError, ValueError, OSError) as error:
        raise RunError(
            f"{fold.best}: not readable as a model of this program ({error}); train the fold again."
        ) from None
    if _hash(state) != described.get("sha256"):
        raise RunError(f"{fold.best}: damaged (its SHA-256 does not fit); train the fold again.")
    model = build_model(fold.config.model, fold.config.pipeline.channels)
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise RunError(
            f"{fold.best}: its weights are not those of {fold.config.model.backbone} as timm makes it here "
            f"({str(error).splitlines()[-1].strip()[:120]}); install the versions in {ENVIRONMENT}, or train again."
        ) from None
    return model.to(torch.device(device)).eval(), described


def _hash(state: dict[str, torch.Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(state):
        digest.update(name.encode() + str(tuple(state[name].shape)).encode())
        digest.update(state[name].reshape(-1).numpy().tobytes())
    return digest.hexdigest()
