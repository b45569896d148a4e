"""Which device and precision a setting means on this machine."""

from __future__ import annotations

import os
import re

import torch

from preprocessing.errors import ConfigError, command_line
from training.config import DEVICES

_NOTICED = 2**30  # bytes


def pick_device(name: str) -> torch.device:
    """The device that `train.device` means; 'auto' is the process's own GPU where there is one.

    Processes that torchrun started (LOCAL_RANK) take a GPU each.

    Raises:
        ConfigError: a GPU is asked for that is not there.
    """
    if not re.fullmatch(DEVICES, name):
        raise ConfigError(f"--device {name}: expected auto, cpu, cuda or cuda:N.")
    rank = int(os.environ.get("LOCAL_RANK", "0"))
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name == "cpu" or (name == "auto" and not count):
        return torch.device("cpu")
    named = name.partition(":")[2]
    index = int(named or rank)
    if count and not named and index >= count:
        raise ConfigError(
            f"torchrun started a process number {rank} here, counted from 0, and torch finds {count} NVIDIA GPU(s): "
            f"each process needs its own, so --nproc-per-node {count} at most."
        )
    if index >= count:
        raise ConfigError(
            f"train.device = {name}: torch finds {count} NVIDIA GPU(s) here; use --set train.device=auto, or see: "
            f"{command_line('doctor')}"
        )
    device = torch.device("cuda", index)
    torch.cuda.set_device(device)
    return device


def pick_precision(name: str, device: torch.device) -> torch.dtype:
    """The type that `train.precision` means on a device.

    Raises:
        ConfigError: fp16 on a CPU, whose convolutions have none.
    """
    if name == "auto":
        if device.type == "cuda":
            return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16
        return torch.float32
    if name == "fp16" and device.type != "cuda":
        raise ConfigError("train.precision = fp16: it needs a GPU; use fp32, bf16 or auto.")
    return {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[name]


def held_by_others(device: torch.device) -> int:
    """Bytes of a GPU's memory that other processes hold, asked before this one has used it: 0 for less than a GiB,
    which may be this process's own context, and afterwards, when its own cannot be told from theirs."""
    free, total = torch.cuda.mem_get_info(device)
    held = total - free
    return held if held > _NOTICED and not torch.cuda.memory_reserved(device) else 0
