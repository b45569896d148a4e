"""SIGTERM and Ctrl-C: noticed, so that a run can save and leave between two steps."""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any

import torch

from training.distributed import World


class StopSignal:
    """While entered, the first SIGTERM or SIGINT is taken note of; a second one has its usual effect.

    Outside the main thread, where Python takes no handlers, it does nothing.
    """

    def __init__(self, every: int = 20) -> None:
        self._every = every
        self._received = 0
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> StopSignal:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._previous[number] = signal.signal(number, self._take_note)
        return self

    def __exit__(self, *error: object) -> None:
        self._restore()

    def agreed(self, world: World, step: int | None = None) -> bool:
        """Whether to stop. Several processes agree, every so many steps, or always where no step is given."""
        if world.size == 1:
            return self._received != 0
        if step is not None and step % self._every:
            return False
        # On the CPU for gloo; NCCL only exchanges what lies on the GPU.
        device = torch.device("cuda") if torch.distributed.get_backend() == "nccl" else torch.device("cpu")
        self._received = int(world.max(torch.tensor(self._received, device=device)))
        return self._received != 0

    @property
    def name(self) -> str:
        """Name of the signal that came."""
        return signal.Signals(self._received).name if self._received else "no signal"

    @property
    def status(self) -> int:
        """Exit status that a shell expects of a process ended by that signal."""
        return 128 + self._received

    def _take_note(self, number: int, frame: FrameType | None) -> None:
        self._received = number
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}
