from __future__ import annotations

import os
from pathlib import Path

import psutil
import pytest

from preprocessing import machine
from preprocessing.errors import ConfigError

GIB = 2**30
MOST, CURRENT, IDLE = "memory.max", "memory.current", "inactive_file"  # of version 2
MOST_1, CURRENT_1, IDLE_1 = "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"


def group(folder: Path, names: tuple[str, str, str], limit: str, used: int, idle: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    most, current, inactive = names
    (folder / most).write_text(f"{limit}\n")
    (folder / current).write_text(f"{used}\n")
    (folder / "memory.stat").write_text(f"anon 1\n{inactive} {idle}\n")


def test_cores_respect_the_affinity():
    assert machine.available_cores() == len(os.sched_getaffinity(0))


def test_cores_respect_a_limit(monkeypatch):
    monkeypatch.setenv("LOKY_MAX_CPU_COUNT", "1")
    assert machine.available_cores() == 1


def test_a_limit_that_is_no_number_is_named(monkeypatch):
    monkeypatch.setenv("LOKY_MAX_CPU_COUNT", "all")
    with pytest.raises(ConfigError, match="LOKY_MAX_CPU_COUNT = 'all'"):
        machine.available_cores()


def test_without_control_groups_memory_is_the_machines(tmp_path):
    found = machine.available_memory(tmp_path / "none", tmp_path / "none either")
    assert found.total == psutil.virtual_memory().total
    assert 0 < found.free <= found.total


@pytest.mark.parametrize("path", ["/", "/slurm/job_7", "/host/path/that/the/container/does/not/see"])
def test_the_narrowest_group_above_the_process_counts(tmp_path, path):
    """A container's own group is the root of what it sees; a batch job's lies below it."""
    own, groups = tmp_path / "own", tmp_path / "groups"
    own.write_text(f"0::{path}\n")
    group(groups, (MOST, CURRENT, IDLE), str(2 * GIB), GIB, GIB // 2)
    group(groups / "slurm", (MOST, CURRENT, IDLE), "max", GIB, 0)
    group(groups / "slurm/job_7", (MOST, CURRENT, IDLE), str(GIB), GIB // 4, 0)
    assert machine.available_memory(groups, own) == ((GIB, 3 * GIB // 4) if "job" in path else (2 * GIB, 3 * GIB // 2))


def test_groups_of_the_first_version_count(tmp_path):
    own, groups = tmp_path / "own", tmp_path / "groups"
    own.write_text("12:cpu,cpuacct:/docker/5\n4:memory:/docker/5\n1:name=systemd:/docker/5\n")
    group(groups / "memory", (MOST_1, CURRENT_1, IDLE_1), str(2 * GIB), GIB, GIB // 2)
    assert machine.available_memory(groups, own) == (2 * GIB, 3 * GIB // 2)


def test_no_memory_is_left_where_more_is_used_than_the_limit(tmp_path):
    """A limit can be set below what is in use."""
    own, groups = tmp_path / "own", tmp_path / "groups"
    own.write_text("0::/\n")
    group(groups, (MOST, CURRENT, IDLE), str(GIB), 2 * GIB, 0)
    assert machine.available_memory(groups, own) == (GIB, 0)
