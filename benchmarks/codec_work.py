"""What codec_speed.py has worker processes do: a module of its own, for they do not import the program."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from preprocessing import gpu_decode
from preprocessing.codecs import CODECS
from preprocessing.codestream import inspect


def host_decode(data: bytes) -> NDArray[np.integer]:
    """What the conversion does of a codestream, without its checks."""
    facts = inspect(data)
    return CODECS[facts.kind].decode(data, facts)


def host_count(files: Sequence[bytes]) -> int:
    """Decode all of them; in a worker process."""
    return sum(host_decode(data).size > 0 for data in files)


def gpu_count(files: Sequence[bytes]) -> int:
    """As `host_count`, in a process that has been connected with the one that owns the GPU."""
    return sum(gpu_decode.decode(data, inspect(data)) is not None for data in files)
