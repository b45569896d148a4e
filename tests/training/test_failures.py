"""Failures of memory, GPU and compiler as advice: errors as torch, CUDA and DALI word them, raised here by hand."""

from __future__ import annotations

import pytest
import torch

from preprocessing.errors import RunError
from tests.training import fakes
from training.failures import loading_advice, prediction_advice, training_advice

DALI = """Critical error in pipeline:
Error in GPU operator `nvidia.dali.fn.decoders.image`,
which was used in the pipeline definition with the following traceback:

  File "dali_pipes/pipelines.py", line 87, in graph
    tile = _decode(fed, "mixed", settings)

encountered:

{}
Current pipeline object is no longer valid."""
OUT_OF_MEMORY = [
    torch.OutOfMemoryError("CUDA out of memory"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:118] DefaultCPUAllocator: not enough memory: you tried to"),
    RuntimeError(DALI.format("CUDA allocation failed")),
    RuntimeError(DALI.format("Can't allocate 536870912 bytes on device 0.")),
    RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
    MemoryError(),
]
GPU_FAILED = [
    torch.AcceleratorError("CUDA error: unspecified launch failure\nCUDA kernel errors might be", 719),
    RuntimeError(DALI.format("CUDA runtime API error cudaErrorIllegalAddress (700):\nan illegal memory access")),
    RuntimeError("cuDNN error: CUDNN_STATUS_EXECUTION_FAILED"),
]


@pytest.mark.parametrize("error", OUT_OF_MEMORY)
def test_training_out_of_memory_says_what_to_lower(error):
    with (
        pytest.raises(RunError, match=r"batch_size=2 train\.accumulate=2.*gradient_checkpointing=true"),
        training_advice(fakes.small_config()),
    ):
        raise error


@pytest.mark.parametrize("error", OUT_OF_MEMORY)
def test_prediction_out_of_memory_says_what_to_lower(error):
    with (
        pytest.raises(RunError, match=r"batches of 32 pictures of up to 512 pixels.*--batch-size 16"),
        prediction_advice(32, 512),
    ):
        raise error
    with (
        pytest.raises(RunError, match=r"one picture of up to 512 pixels.*--device cpu"),
        prediction_advice(1, 512),
    ):
        raise error
    with pytest.raises(RunError, match=r"while the models were loaded.*--device cpu"), loading_advice():
        raise error


@pytest.mark.parametrize("error", GPU_FAILED)
def test_a_gpu_that_fails_says_how_to_go_on(error):
    with (
        pytest.raises(
            RunError, match=r"The GPU failed \(.*(CUDA|cuDNN) .*\)\. See what nvidia-smi.*--resume.*checkpoint is sound"
        ),
        training_advice(fakes.small_config()),
    ):
        raise error
    for advice in (prediction_advice(32, 512), loading_advice()):
        with (
            pytest.raises(
                RunError,
                match=r"The GPU failed \(.*(CUDA|cuDNN) .*\)\. See what nvidia-smi.*again, or with --device cpu",
            ),
            advice,
        ):
            raise error


def test_a_model_that_does_not_compile_says_what_to_set():
    class InductorError(RuntimeError):
        __module__ = "torch._inductor.exc"

    with (
        pytest.raises(RunError, match=r"could not compile resnet10t .*C\+\+ compile error.*model\.compile=false"),
        training_advice(fakes.small_config("model.compile=true")),
    ):
        raise InductorError("CppCompileError: C++ compile error\nmany lines")


def test_a_batch_too_small_for_batch_normalisation_says_what_to_raise():
    config, norm = fakes.small_config("data.loader.batch_size=1"), torch.nn.BatchNorm2d(4)
    message = r"batch_size = 1: resnet10t leaves batch normalisation one value a channel"
    with pytest.raises(RunError, match=message), training_advice(config):
        norm(torch.zeros(1, 4, 1, 1))


def test_other_errors_pass_through():
    with pytest.raises(RuntimeError, match="shapes"), training_advice(fakes.small_config()):
        raise RuntimeError("shapes do not fit")
    with pytest.raises(RuntimeError, match="shapes"), prediction_advice(32, 512):
        raise RuntimeError("shapes do not fit")
