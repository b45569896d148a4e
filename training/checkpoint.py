"""Checkpoints that can be trusted: written atomically, hashed, read as data only, the newest sound one found.

A checkpoint is `step-<step>.pt` (tensors and plain values, a torch zip) and `step-<step>.json` beside it, which names
its SHA-256, where the run stood and what it belongs to. The JSON is written last: weights without it are unfinished.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
from pathlib import Path
from typing import Any

import torch

from preprocessing.errors import RunError
from preprocessing.files import write_atomically
from training.trackers import flatten

log = logging.getLogger(__name__)

VERSION = 1
# Settings that change how a run goes but not what comes out: a checkpoint may be continued with others.
FREE = (
    "monitor",
    "train.device",
    "train.checkpoint_minutes",
    "train.checkpoint_steps",
    "train.keep_checkpoints",
    "model.compile",
    "model.compile_mode",
    "model.gradient_checkpointing",
    "train.cudnn_benchmark",
    "train.covariates",  # fitted after training
    "data.extra_stores",  # they may have moved; what is in them is compared
    "data.loader.threads",
    "data.loader.prefetch",
    "data.loader.steps_on",
    "data.loader.cache",
    "data.loader.cache_mb",
    "data.loader.max_bad_samples",
)


def save(folder: Path, state: dict[str, Any], described: dict[str, Any], keep: int) -> Path:
    """Write a checkpoint and remove all but the latest `keep`, those of later steps too: a run that saves this step has
    gone on from one before them, because they were unfinished or damaged.

    Args:
        folder: `checkpoints` of a fold's run.
        state: tensors and plain values, nested; everything needed to continue.
        described: `step` (int) and whatever else the JSON beside it shall say.
        keep: how many to leave, this one counted.

    Raises:
        RunError: the disk is full or the folder cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    buffer = io.BytesIO()
    torch.save(state, buffer)
    data = buffer.getvalue()
    path = folder / f"step-{described['step']:08d}.pt"
    head = {"version": VERSION, "file": path.name, "sha256": hashlib.sha256(data).hexdigest(), **described}
    try:
        write_atomically(path, data)
        write_atomically(path.with_suffix(".json"), (json.dumps(head, indent=1) + "\n").encode())
    except OSError as error:
        raise RunError(
            f"{path}: the checkpoint of {len(data):,} bytes cannot be written ({error.strerror}); make room or name "
            "another folder. Earlier checkpoints are sound."
        ) from None
    there = sorted(folder.glob("step-*.pt"))
    kept = [each for each in there if each.name <= path.name][-keep:]
    for old in set(there) - set(kept):
        old.with_suffix(".json").unlink(missing_ok=True)
        old.unlink()
    for leftover in folder.glob(".*.tmp"):  # of a process that was killed in a save
        leftover.unlink(missing_ok=True)
    return path


def load(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """A checkpoint's state, on the CPU, and its description.

    Raises:
        RunError: unfinished, damaged, or of another version.
    """
    beside = path.with_suffix(".json")
    try:
        described = json.loads(beside.read_text(encoding="utf-8"))
        version, expected = described["version"], described["sha256"]
    except (OSError, ValueError, KeyError, TypeError):
        raise RunError(f"{path}: its description {beside.name} is missing or not readable.") from None
    if version != VERSION:
        raise RunError(f"{path}: a checkpoint of version {version}; this program reads version {VERSION}.")
    try:
        data = path.read_bytes()
    except OSError as error:
        raise RunError(f"{path}: not readable ({error.strerror}).") from None
    found = hashlib.sha256(data).hexdigest()
    if found != expected:
        raise RunError(f"{path}: damaged (SHA-256 {found[:12]}…, expected {expected[:12]}…).")
    return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True), described


def newest(folder: Path) -> tuple[dict[str, Any], dict[str, Any]] | None:
    """The latest sound checkpoint; damaged and unfinished ones are named in the log and passed over.

    Returns:
        State and description, or None where there is no checkpoint at all.

    Raises:
        RunError: there are some, but none is sound.
    """
    paths = sorted(folder.glob("step-*.pt"), reverse=True)
    for path in paths:
        try:
            return load(path)
        except RunError as error:
            log.warning("%s Using the one before it.", error)
    if paths:
        raise RunError(f"{folder}: none of its {len(paths)} checkpoints is sound; start again without --resume.")
    return None


def differences(saved: dict[str, Any], wanted: dict[str, Any]) -> list[str]:
    """What two resolved configurations disagree on, as "train.lr: 0.0001 there, 0.0003 now"; `FREE` ones left out."""
    flat_saved, flat_wanted = flatten(saved), flatten(wanted)
    return [
        f"{name}: {flat_saved.get(name, 'absent')} there, {flat_wanted.get(name, 'absent')} now"
        for name in sorted(flat_saved.keys() | flat_wanted.keys())
        if flat_saved.get(name) != flat_wanted.get(name) and not _is_free(name)
    ]


def _is_free(name: str) -> bool:
    return any(name == free or name.startswith(free + ".") for free in FREE)
