"""In a process of its own: the setting holds for good."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

FAULTS = """
import resource, sys
import torch
from training.allocator import keep_freed_memory

if sys.argv[1] == "kept":
    assert keep_freed_memory()
torch.set_num_threads(1)
for _ in range(12):  # glibc splits what it aligns, and joins the rests after some rounds
    torch.ones(2**24)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5):
    torch.ones(2**24)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(how: str) -> int:
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run([sys.executable, "-c", FAULTS, how], cwd=root, capture_output=True, text=True, check=True)
    return int(done.stdout)


def test_freed_memory_is_not_asked_for_again():
    """Blocks of 64 MiB: below 32 MiB glibc itself learns to keep them."""
    assert 4 * faults("kept") < faults("given back")
