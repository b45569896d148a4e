"""A CPU prepared for torch: as many threads as there are cores to use, freed memory kept for the next tensors."""

from __future__ import annotations

import os

import torch

from dali_pipes.memory import keep_freed_memory
from preprocessing.machine import available_cores


def prepare_cpu() -> None:
    """Have torch compute on a CPU as it goes best there. `OMP_NUM_THREADS` has the last word on threads: without it
    torch takes one a core of the machine, in a container with a quota as well, where they then wait for each other."""
    keep_freed_memory()
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(min(torch.get_num_threads(), available_cores()))
