"""What torch, CUDA and DALI raise where memory runs out, a GPU fails or a model does not compile, as advice."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from preprocessing.errors import RunError
from training.config import Config

# How torch's CPU allocator, CUDA and DALI say that there is no memory left; and how the latter say that a GPU is gone.
_MEMORY_SIGNS = ("not enough memory", "can't allocate memory", "out of memory", "cudaErrorMemoryAllocation")
_GPU_SIGNS = ("CUDA error", "CUDA runtime API error", "CUDA driver API error", "cuDNN error", "NCCL error")


@contextmanager
def failure_advice(config: Config) -> Iterator[None]:
    """Turn running out of memory, a GPU that fails and a model that does not compile into a `RunError` that says what
    to do."""
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise RunError(_advice(config)) from error
    except RuntimeError as error:
        text = str(error)
        if any(sign in text for sign in _MEMORY_SIGNS):
            raise RunError(_advice(config)) from error
        if any(sign in text for sign in _GPU_SIGNS):
            raise RunError(
                f"The GPU failed ({_first(text)}). The last checkpoint is sound: see what nvidia-smi and the kernel's "
                "log (dmesg, lines with Xid) say, restart what holds the GPU or the machine, and run the same command "
                "with --resume."
            ) from error
        if type(error).__module__.startswith(("torch._inductor", "torch._dynamo")):
            raise RunError(
                f"model.compile = true: torch could not compile {config.model.backbone} here ({_first(text)}); mend "
                "its compiler (--traceback shows what it said), or set model.compile=false."
            ) from error
        raise


def _first(text: str) -> str:
    return text.strip().splitlines()[0][:200]


def _advice(config: Config) -> str:
    batch = config.data.loader.batch_size
    pixels = f"{config.pipeline.height} x {config.pipeline.width}"
    smaller = f"data.loader.batch_size={max(1, batch // 2)} train.accumulate={2 * config.train.accumulate}"
    checkpointing = "" if config.model.gradient_checkpointing else ", or set model.gradient_checkpointing=true"
    return (
        f"Out of memory with batches of {batch} pictures of {pixels} and {config.model.backbone}. Lower the batch "
        f"({smaller}), or the size (pipeline.height and width){checkpointing}, or let --set train.auto_batch=true find "
        "the batch. The last checkpoint is sound."
    )
