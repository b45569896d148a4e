"""What a run was made with: versions, device, store, command, commit. Kept as environment.json."""

from __future__ import annotations

import hashlib
import importlib.metadata
import platform
import subprocess
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from dali_pipes.sampling import hard_negatives
from preprocessing.machine import available_cores
from preprocessing.manifest import Store
from training.config import Config
from training.distributed import World
from training.extra import fingerprint, labelled, open_extra
from training.folds import held_out_digest
from training.losses import aux_targets

PACKAGES = (
    *("mammopipe", "torch", "torchvision", "timm", "nvidia-dali-cuda120", "nvidia-dali-cuda130"),
    *("numpy", "pandas", "scikit-learn"),
)
EXTRA = "extra_stores"  # among the facts


def describe(
    config: Config,
    store: Store,
    fold: int,
    training: pd.DataFrame,
    device: torch.device,
    world: World,
    command: str,
    weights: str,
) -> dict[str, Any]:
    """The record of a run's beginning; `training` are its rows, `weights` is what the backbone began with."""
    own = training[training["fold"].notna()]  # another data set's machine 48 is not this one's
    return {
        "fold": fold,
        "store": str(store.root.resolve()),
        "store_fingerprint": store.fingerprint,
        "store_settings": store.settings.model_dump(mode="json"),
        "command": command,
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "weights": weights,
        "device": str(device),
        "device_name": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or "CPU",
        "processes": world.size,
        "threads": torch.get_num_threads(),
        "cores": available_cores(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: version for name in PACKAGES if (version := _version(name))},
        "cuda": torch.version.cuda,
        "git_commit": git_commit(),
        "held_out": held_out_digest(store, fold),
        "facts_read": facts_trained_on(store, config),
        "training": {
            "images": len(training),
            "machines": sorted(own["machine_id"].unique().tolist()),
            "sites": sorted(own["site_id"].unique().tolist()),
            "extra_stores": [str(Path(each).resolve()) for each in config.data.extra_stores],
        },
    }


def facts_trained_on(store: Store, config: Config) -> dict[str, str]:
    """What training reads of the table beyond that which the store's fingerprint is over, and its list of hard
    negatives: SHA-256 by the column's or the setting's name, in hexadecimal.

    Raises:
        ConfigError: an auxiliary head has nothing to learn from in the store.
        InputError: the list of hard negatives cannot be read.
    """
    data, loader, rows = config.data, config.data.loader, store.manifest
    others = open_extra(store, data.extra_stores)
    if others:
        rows = pd.concat([rows, labelled(others)], ignore_index=True)
    names = [loader.weight_column] if loader.weight_column else []
    names += [name for name, held in (("machine_id", data.holdout_machines), ("site_id", data.holdout_sites)) if held]
    read = rows[[name for name in names if name in rows]]
    classes = aux_targets(rows, config.model.aux, torch.device("cpu"))
    read = read.assign(**{name: values.numpy() for name, values in classes.items()})
    found = {name: rows[["image_id"]].assign(value=values).to_csv(index=False) for name, values in read.items()}
    if loader.hard_negatives:
        found["hard_negatives"] = "\n".join(sorted(hard_negatives(loader.hard_negatives) & set(rows["image_id"])))
    digests = {str(name): hashlib.sha256(content.encode()).hexdigest() for name, content in found.items()}
    return digests | ({EXTRA: fingerprint(others)} if others else {})


def git_commit() -> str | None:
    """The commit of the checkout that this code runs from, with "+" where it was changed since; None without git."""
    root = Path(__file__).resolve().parents[1]
    if not (root / ".git").exists():
        return None
    try:
        commit = _git(root, "rev-parse", "HEAD")
        return commit + ("+" if _git(root, "status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def _git(root: Path, *arguments: str) -> str:
    done = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, timeout=10, check=True)
    return done.stdout.strip()


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
