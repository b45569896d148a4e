"""SIGTERM and Ctrl-C: noticed, so that a run can save and leave between two steps."""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType
from typing import Any

import torch

from training.distributed import World


class StopSignal:
    """While entered, the first SIGTERM or SIGINT is taken note of; a second one has its usual effect. One that nobody
    left for has it too, when the block has ended without an error.

    Outside the main thread, where Python takes no handlers, it does nothing.
    """

    def __init__(self) -> None:
        self._received = 0
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> StopSignal:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._previous[number] = signal.signal(number, self._take_note)
        return self

    def __exit__(self, kind: object, *error: object) -> None:
        self._restore()
        if self._received and kind is None:
            signal.raise_signal(self._received)

    def agreed(self, world: World, due: bool = False) -> tuple[bool, bool]:
        """Whether to stop, and whether what is `due` to one of them is so to all. Several processes agree on both,
        between themselves and without waiting for their GPUs: asked after every step, for torchrun kills what has not
        ended 30 s after the signal."""
        if world.size == 1:
            return self._received != 0, due
        found, due = world.max(torch.tensor([self._received, due])).tolist()
        self._received = max(self._received, found)  # one that came during the exchange is for the next one
        return found != 0, bool(due)

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
        # torchrun passes on a SIGTERM, which its processes may have had themselves: that is no second one.
        self._restore(signal.SIGINT if "TORCHELASTIC_RUN_ID" in os.environ else None)

    def _restore(self, alone: int | None = None) -> None:
        for number in [each for each in self._previous if alone in (None, each)]:
            signal.signal(number, self._previous.pop(number))
