"""The processes that train together: torchrun's environment, and the few exchanges that the loop needs.

Every method is harmless, and free, in a run of one process. Nothing here is an engine: gradients are averaged by
DistributedDataParallel, and torchrun starts, watches and ends the processes.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from preprocessing.errors import ConfigError


@dataclass(frozen=True)
class World:
    """This process's place: `rank` of `size`."""

    rank: int = 0
    size: int = 1

    @property
    def is_main(self) -> bool:
        """Whether this process writes the files."""
        return self.rank == 0

    def sum(self, value: Tensor) -> Tensor:
        """The value added up over the processes; no gradient flows through it."""
        return self._reduce(value, dist.ReduceOp.SUM)

    def max(self, value: Tensor) -> Tensor:
        """The largest of the processes' values."""
        return self._reduce(value, dist.ReduceOp.MAX)

    def gather(self, value: Any) -> list[Any]:
        """The processes' values, in order of rank, on every process; anything that can be pickled."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def barrier(self) -> None:
        """Wait until every process is here."""
        if self.size > 1:
            dist.barrier()

    def share_buffers(self, module: nn.Module) -> None:
        """Give every process the first one's buffers: batch statistics differ by their last step otherwise."""
        if self.size > 1:
            for buffer in module.buffers():
                dist.broadcast(buffer, src=0)

    def _reduce(self, value: Tensor, operation: Any) -> Tensor:
        if self.size == 1:
            return value
        value = value.detach().clone()
        dist.all_reduce(value, operation)
        return value


@contextmanager
def world(device: torch.device | None = None, timeout_s: float = 600.0) -> Iterator[World]:
    """Join the processes that torchrun started, for the length of the `with`; without torchrun there is one.

    Args:
        device: where training runs; NCCL exchanges what lies on GPUs, gloo what lies in RAM.
        timeout_s: after so long without an answer from another process an exchange fails.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        yield World()
        return
    lacking = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if lacking:
        raise ConfigError(
            f"WORLD_SIZE is {size} in the environment, but {lacking[0]} is not: start with torchrun, or unset it."
        )
    place = World(int(os.environ["RANK"]), size)
    if dist.is_initialized():  # several folds in one call share the group
        yield place
        return
    backend = "cpu:gloo,cuda:nccl" if device is not None and device.type == "cuda" else "gloo"
    dist.init_process_group(backend, timeout=timedelta(seconds=timeout_s))
    try:
        yield place
    finally:
        dist.destroy_process_group()
