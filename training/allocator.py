"""The C library's allocator, told to keep the memory of freed tensors for the next ones.

glibc gives large blocks back to the system at once, and the system clears every page that it hands out again: on a CPU
that costs a training step, with its hundreds of activations of several MB each, a third of its time and more.
"""

from __future__ import annotations

import ctypes

# malloc.h
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4
_NEVER = 2**31 - 1


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
