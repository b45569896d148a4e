"""A CPU prepared for torch: as many threads as there are cores to use, freed memory kept for the next tensors.

glibc gives large blocks back to the system at once, and the system clears every page that it hands out again: on a CPU
that costs a training step, with its hundreds of activations of several MB each, a third of its time and more.
"""

from __future__ import annotations

import ctypes
import os

import torch

from preprocessing.machine import available_cores

# malloc.h
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4
_NEVER = 2**31 - 1


def prepare_cpu() -> None:
    """Have torch compute on a CPU as it goes best there. `OMP_NUM_THREADS` has the last word on threads: without it
    torch takes one a core of the machine, in a container with a quota as well, where they then wait for each other."""
    keep_freed_memory()
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(min(torch.get_num_threads(), available_cores()))


def keep_freed_memory() -> bool:
    """Have this process keep what it frees, from now on; whether the C library can be told (glibc can).

    Training tf_efficientnet_lite0 at 512 by 352, in batches of 16 on two cores, then takes 0.63 of the time (0.77 with
    two stages frozen), predicting with it a third, with the same results and 5 to 19 % more memory.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # musl, macOS, Windows
        return False
    return bool(mallopt(_M_MMAP_MAX, 0)) and bool(mallopt(_M_TRIM_THRESHOLD, _NEVER))
