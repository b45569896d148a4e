"""In a process of its own: the setting holds for good."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

THREADS = """
import torch
from training.cpu import prepare_cpu

prepare_cpu()
print(torch.get_num_threads())
"""


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="has one core")
@pytest.mark.parametrize(("wanted", "threads"), [(None, "1"), ("2", "2")])
def test_torch_takes_no_more_threads_than_cores_are_granted(wanted, threads):
    """A limit of its own stands for a container's quota; OMP_NUM_THREADS overrules it."""
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    environment |= {"LOKY_MAX_CPU_COUNT": "1", **({"OMP_NUM_THREADS": wanted} if wanted else {})}
    command = [sys.executable, "-c", THREADS]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == threads
