"""The graphs: from a source of samples to finished batches."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

from nvidia.dali import fn
from nvidia.dali.pipeline import Pipeline, do_not_convert, pipeline_def
from nvidia.dali.types import DALIDataType, DALIImageType

from dali_pipes.operators import all_steps, normalise
from dali_pipes.settings import PipelineSettings

_FED = (  # `source.Sample`, in its order: type and dimensions
    (DALIDataType.UINT8, 1),
    (DALIDataType.FLOAT, 1),
    (DALIDataType.FLOAT, 2),
    (DALIDataType.FLOAT, 1),
    (DALIDataType.FLOAT, 3),
    (DALIDataType.FLOAT, 2),
)


def host_pipeline(
    source: Callable[[], Sequence[Any]], settings: PipelineSettings, batch_size: int, threads: int, prefetch: int
) -> Pipeline:
    """The pipeline without GPU: the source has decoded with imagecodecs and done the steps with OpenCV, a sample a
    thread; DALI normalises, makes batches and prefetches.

    On a CPU OpenCV's warp takes a tenth of the time of DALI's, and imagecodecs' decoders half of that of DALI's. One
    function for all of a sample keeps it in the processor's cache; steps in a `python_function` of the graph would have
    all threads wait for the slowest sample of each batch.

    Args:
        source: gives a batch of pictures, float32 [H, W, 1] in [0, 1]; raises StopIteration at the end.
        settings: of the pipeline.
        batch_size: the largest batch.
        threads: of DALI.
        prefetch: batches prepared ahead.

    Returns:
        A built pipeline whose output is float32 [B, C, H, W].
    """
    pipeline = Pipeline(batch_size, threads, device_id=None, prefetch_queue_depth=prefetch, exec_dynamic=True)
    with pipeline:
        pictures = fn.external_source(
            source=source, batch=True, dtype=DALIDataType.FLOAT, ndim=3, layout="HWC", no_copy=True
        )
        pipeline.set_outputs(normalise(pictures, settings))
    pipeline.build()
    return pipeline


def operator_pipeline(
    source: Callable[[], Sequence[Sequence[Any]]],
    settings: PipelineSettings,
    batch_size: int,
    threads: int,
    prefetch: int,
    device_id: int | None,
    decoded: bool = False,
    on_device: bool = False,
) -> Pipeline:
    """The same with every step, and decoding, a DALI operator, on a GPU.

    Args:
        source: gives a batch, for each field of `source.Sample` the samples' arrays; raises StopIteration at the end.
        settings, batch_size, threads, prefetch: as for `host_pipeline`.
        device_id: of the GPU; None for DALI's CPU backend, where tests compare it with the other pipeline.
        decoded: the source gives levels as arrays, not files.
        on_device: the source gives levels as tensors on the GPU, int16 in the place of uint16.

    Returns:
        A built pipeline whose output is float32 [B, C, H, W] on the device.
    """
    device = "cpu" if device_id is None else "gpu"

    @pipeline_def(enable_conditionals=True)
    def graph() -> Any:
        fed: Any = _fed_on_device(source) if on_device else _fed(source, decoded)
        if on_device:
            tile = fn.reinterpret(fed[0], dtype=DALIDataType.UINT16)
        elif decoded:
            tile = fed[0].gpu() if device == "gpu" else fed[0]
        else:
            tile = _decode(fed, "mixed" if device == "gpu" else "cpu", settings)
        _, numbers, matrix, table, grid, holes = fed
        return all_steps(tile, numbers, matrix, table, grid, holes, settings, device)

    pipeline = graph(
        batch_size=batch_size,
        num_threads=threads,
        device_id=device_id,
        prefetch_queue_depth=prefetch,
        exec_dynamic=True,
    )
    pipeline.build()
    return pipeline


def decode(encoded: Any, device: str) -> Any:
    """Tile files to uint16 HWC, the stored values as they are (INT16 would halve them, FLOAT scale them)."""
    return fn.decoders.image(encoded, device=device, dtype=DALIDataType.UINT16, output_type=DALIImageType.ANY_DATA)


def decode_region(encoded: Any, region: Any, device: str) -> Any:
    """As `decode`, a region alone (top, left, rows, columns): of a tiled file the tiles that it touches are decoded."""
    return fn.decoders.image_slice(
        encoded,
        start=region[:2],
        shape=region[2:],
        axes=[0, 1],
        device=device,
        dtype=DALIDataType.UINT16,
        output_type=DALIImageType.ANY_DATA,
    )


@do_not_convert
def _decode(fed: Any, device: str, settings: PipelineSettings) -> Any:
    """Whole levels, or what a patch shows of them."""
    if settings.patch_level is None:
        return decode(fed[0], device)
    return decode_region(fed[0], fn.cast(fed[1][-4:], dtype=DALIDataType.INT32), device)


@do_not_convert
def _fed(source: Callable[[], Any], decoded: bool) -> Any:
    """A batch's columns as nodes. Nothing is copied: the loader holds the arrays until the batch has come out."""
    columns: Any = zip(*_FED, strict=True)
    kinds, dimensions = map(list, columns)
    layouts = [""] * len(_FED)
    if decoded:
        kinds[0], dimensions[0], layouts[0] = DALIDataType.UINT16, 3, "HWC"
    return fn.external_source(
        source=source, num_outputs=len(_FED), batch=True, dtype=kinds, ndim=dimensions, layout=layouts, no_copy=True
    )


@do_not_convert
def _fed_on_device(source: Callable[[], Any]) -> Any:
    """As `_fed`, the pictures being on the GPU already."""
    pictures, arguments = halves(source)
    columns: Any = zip(*_FED[1:], strict=True)
    kinds, dimensions = map(list, columns)
    others = fn.external_source(
        source=arguments, num_outputs=len(kinds), batch=True, dtype=kinds, ndim=dimensions, no_copy=True
    )
    on_gpu = fn.external_source(
        source=pictures, batch=True, dtype=DALIDataType.INT16, ndim=3, layout="HWC", device="gpu", no_copy=True
    )
    return [on_gpu, *others]


def halves(source: Callable[[], Sequence[Any]]) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """Two sources, of a batch's pictures and of its other columns, out of one. DALI asks each once a batch, in an order
    of its own."""
    waiting: tuple[deque[Any], deque[Any]] = deque(), deque()

    def half(which: int) -> Any:
        if not waiting[which]:
            pictures, *others = source()
            waiting[0].append(pictures)
            waiting[1].append(others)
        return waiting[which].popleft()

    return lambda: half(0), lambda: half(1)
