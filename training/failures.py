"""What torch, CUDA and DALI raise where memory runs out, a GPU fails or a model does not compile, as advice."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from preprocessing.errors import RunError
from training.config import Config

# How torch's CPU allocator, CUDA and DALI say that there is no memory left; and how the latter say that a GPU is gone.
_MEMORY_SIGNS = (
    *("not enough memory", "can't allocate memory", "out of memory"),
    *("CUDA allocation failed", "Can't allocate", "allocate virtual address space", "STATUS_ALLOC_FAILED"),
)
_GPU_SIGNS = ("CUDA error", "CUDA runtime API error", "CUDA driver API error", "cuDNN error", "NCCL error")


@contextmanager
def training_advice(config: Config) -> Iterator[None]:
    """Turn running out of memory, a GPU that fails, a model that does not compile and a batch that is too small for
    batch normalisation into a `RunError` that says what to do."""
    after = "and run the same command with --resume. The last checkpoint is sound."
    try:
        with _told(_lower_training(config), after):
            yield
    except RuntimeError as error:
        if type(error).__module__.startswith(("torch._inductor", "torch._dynamo")):
            raise RunError(
                f"model.compile = true: torch could not compile {config.model.backbone} here ({_line(str(error))}); "
                "mend its compiler (--traceback shows what it said), or set model.compile=false."
            ) from error
        raise
    except ValueError as error:
        if "more than 1 value per channel" in str(error):
            raise RunError(
                f"data.loader.batch_size = {config.data.loader.batch_size}: {config.model.backbone} leaves batch "
                "normalisation one value a channel, of which it needs two or more. Raise the batch size, or the size "
                "of the pictures: pipeline.height and width, and the shares of train.progressive."
            ) from error
        raise


@contextmanager
def prediction_advice(batch: int, side: int) -> Iterator[None]:
    """The same for a prediction in batches of so many pictures, of `side` pixels at most."""
    lower = (
        f"Out of memory with batches of {batch} pictures of up to {side} pixels; no submission was written. Run the "
        f"same command with --batch-size {batch // 2}."
        if batch > 1
        else f"Out of memory with one picture of up to {side} pixels at a time; no submission was written. Predict "
        "with fewer runs at once, or with --device cpu."
    )
    after = (
        "and run the same command again, or with --device cpu. No submission was written; from --images the same "
        "command goes on where its last chunk ended."
    )
    with _told(lower, after):
        yield


@contextmanager
def loading_advice() -> Iterator[None]:
    """The same while the models that predict are loaded."""
    lower = (
        "Out of memory while the models were loaded. See with nvidia-smi what else holds the GPU, or run the same "
        "command with --device cpu."
    )
    with _told(lower, "and run the same command again, or with --device cpu."):
        yield


@contextmanager
def _told(out_of_memory: str, after_the_gpu: str) -> Iterator[None]:
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise RunError(out_of_memory) from error
    except RuntimeError as error:
        text = str(error)
        if any(sign in text for sign in _MEMORY_SIGNS):
            raise RunError(out_of_memory) from error
        if any(sign in text for sign in _GPU_SIGNS):
            said = _line(text, _GPU_SIGNS)
            raise RunError(
                f"The GPU failed ({said}). See what nvidia-smi and the kernel's log (dmesg, lines with Xid) say, "
                f"restart what holds the GPU or the machine, {after_the_gpu}"
            ) from error
        raise


def _line(text: str, signs: tuple[str, ...] = ("",)) -> str:
    """The first line with one of the signs: DALI's come after its traceback of the graph."""
    lines = text.strip().splitlines()
    return next((line.strip()[:200] for line in lines if any(sign in line for sign in signs)), "")


def _lower_training(config: Config) -> str:
    batch = config.data.loader.batch_size
    pixels = f"{config.pipeline.height} x {config.pipeline.width}"
    smaller = f"data.loader.batch_size={max(1, batch // 2)}"
    if config.model.compile_mode == "default":  # CUDA graphs let no gradients add up
        smaller += f" train.accumulate={2 * config.train.accumulate}"
    checkpointing = "" if config.model.gradient_checkpointing else ", or set model.gradient_checkpointing=true"
    return (
        f"Out of memory with batches of {batch} pictures of {pixels} and {config.model.backbone}. Lower the batch "
        f"({smaller}), or the size (pipeline.height and width){checkpointing}, or let --set train.auto_batch=true find "
        "the batch. The last checkpoint is sound."
    )
