"""What of this machine the process may use: all of it, or what a container or a batch system grants."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import joblib
import psutil

from preprocessing.errors import ConfigError


class Memory(NamedTuple):
    """Main memory in bytes: what there is for this process and those it shares with, and what of it is free."""

    total: int
    free: int


def available_cores() -> int:
    """Cores that this process may keep busy, at least 1: those of the machine, of its affinity, or as many as the quota
    of its container comes to (`docker run --cpus`), whichever are fewest.

    Raises:
        ConfigError: LOKY_MAX_CPU_COUNT, which lowers it, is no number.
    """
    try:
        return joblib.cpu_count()
    except ValueError:
        found = os.environ.get("LOKY_MAX_CPU_COUNT")
        raise ConfigError(f"LOKY_MAX_CPU_COUNT = {found!r} in the environment: expected a whole number.") from None


def processes_here() -> int:
    """Processes that torchrun started on this machine, which share it; 1 without torchrun."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def available_memory(groups: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> Memory:
    """The machine's memory, or what the control groups of this process leave of it (`docker run --memory`, Slurm).

    Source: the kernel's cgroup-v2.rst and cgroup-v1/memory.rst. Pages of files that were not used of late
    count as free, for the kernel takes them back before it refuses anything.
    """
    machine = psutil.virtual_memory()
    limits = list(_limits(groups, own))
    return Memory(
        min([machine.total, *(limit for limit, _ in limits)]),
        min([machine.available, *(max(limit - used, 0) for limit, used in limits)]),
    )


def _limits(groups: Path, own: Path) -> Iterator[tuple[int, int]]:
    """Limit and use of each control group above this process that has a limit. In a container without a namespace of
    its own the path is the host's: then only the root is there, which is the container's group."""
    with suppress(OSError):
        for line in own.read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if not controllers:
                root, (most, current, idle) = groups, ("memory.max", "memory.current", "inactive_file")
            elif "memory" in controllers.split(","):
                root = groups / "memory"
                most, current, idle = "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"
            else:
                continue
            folder = root / path.strip("/")
            for group in (folder, *folder.parents):
                with suppress(OSError, ValueError):  # not there, or 'max'
                    limit = int((group / most).read_text())
                    stat = dict(entry.split() for entry in (group / "memory.stat").read_text().splitlines())
                    yield limit, int((group / current).read_text()) - int(stat.get(idle, 0))
                if group == root:
                    break
