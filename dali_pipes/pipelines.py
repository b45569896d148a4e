"""The graphs: from a source of samples to finished batches."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from nvidia.dali import fn
from nvidia.dali.pipeline import Pipeline, do_not_convert, pipeline_def
from nvidia.dali.types import DALIDataType, DALIImageType

from dali_pipes.feed import Column, Uses, columns
from dali_pipes.operators import all_steps, normalise
from dali_pipes.settings import PipelineSettings


def host_pipeline(
    source: Callable[[], Sequence[Any]],
    settings: PipelineSettings,
    batch_size: int,
    threads: int,
    prefetch: int,
    device_id: int | None = None,
) -> Pipeline:
    """The pipeline whose steps are the host's: the source has decoded with imagecodecs and done them with OpenCV, a
    sample a thread; DALI uploads where there is a GPU, normalises, makes batches and prefetches.

    On a CPU OpenCV's warp takes a tenth of the time of DALI's, and imagecodecs' decoders half of that of DALI's. One
    function for all of a sample keeps it in the processor's cache; steps in a `python_function` of the graph would have
    all threads wait for the slowest sample of each batch.

    Args:
        source: gives a batch of pictures, float32 [H, W, 1] in [0, 1]; raises StopIteration at the end.
        settings: of the pipeline.
        batch_size: the largest batch.
        threads: of DALI.
        prefetch: batches prepared ahead.
        device_id: of the GPU that the batches are for; None for the host.

    Returns:
        A built pipeline whose output is float32 [B, C, H, W], on the device.
    """
    pipeline = Pipeline(batch_size, threads, device_id=device_id, prefetch_queue_depth=prefetch, exec_dynamic=True)
    with pipeline:
        pictures = fn.external_source(
            source=source, batch=True, dtype=DALIDataType.FLOAT, ndim=3, layout="HWC", no_copy=True
        )
        pipeline.set_outputs(normalise(pictures if device_id is None else pictures.gpu(), settings))
    pipeline.build()
    return pipeline


def operator_pipeline(
    source: Callable[[], Sequence[Any]],
    settings: PipelineSettings,
    uses: Uses,
    batch_size: int,
    threads: int,
    prefetch: int,
    device_id: int | None,
    decoded: bool = False,
    uploads: Any = None,
) -> Pipeline:
    """The same with every step, and decoding, a DALI operator, on a GPU.

    Args:
        source: gives a batch as `feed.feed` makes it of samples; raises StopIteration at the end.
        settings, batch_size, threads, prefetch: as for `host_pipeline`.
        uses: the steps that the samples take.
        device_id: of the GPU; None for DALI's CPU backend, where tests compare it with the other pipeline.
        decoded: the source gives levels as arrays, not files.
        uploads: the source gives levels as tensors on the GPU, int16 in the place of uint16, made in this CUDA stream.

    Returns:
        A built pipeline whose output is float32 [B, C, H, W] on the device.
    """
    device = "cpu" if device_id is None else "gpu"

    @pipeline_def(enable_conditionals=True)
    def graph() -> Any:
        picture, fed = _inputs(source, columns(uses, settings), decoded, uploads)
        if uploads is not None:
            tile = fn.reinterpret(picture, dtype=DALIDataType.UINT16)
        elif decoded:
            tile = picture.gpu() if device == "gpu" else picture
        else:
            tile = _decode(picture, fed, "mixed" if device == "gpu" else "cpu")
        return all_steps(tile, fed, uses, settings, device)

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
def _decode(picture: Any, fed: Mapping[str, Any], device: str) -> Any:
    """Whole levels, or what a patch shows of them."""
    return decode_region(picture, fed["region"], device) if "region" in fed else decode(picture, device)


@do_not_convert
def _inputs(
    source: Callable[[], Any], wanted: Sequence[Column], decoded: bool, uploads: Any
) -> tuple[Any, dict[str, Any]]:
    """A batch's pictures and its other columns as nodes. Arrays are not copied: the loader holds them until the batch
    has come out. DALI joins levels on the GPU into one buffer; it does so in the stream that made them, for in torch's
    current one, its own choice, the copy would stand behind all that training has queued."""
    names, kinds, dimensions = (list(each) for each in zip(*wanted, strict=True))
    layouts = ["HWC" if count == 3 else "" for count in dimensions]
    if uploads is not None:
        pictures, arguments = halves(source)
        others = fn.external_source(
            source=arguments,
            num_outputs=len(wanted),
            batch=True,
            dtype=kinds,
            ndim=dimensions,
            layout=layouts,
            no_copy=True,
        )
        picture = fn.external_source(
            source=pictures,
            batch=True,
            dtype=DALIDataType.INT16,
            ndim=3,
            layout="HWC",
            device="gpu",
            cuda_stream=uploads,
        )
    else:
        first, layout = ((DALIDataType.UINT16, 3), "HWC") if decoded else ((DALIDataType.UINT8, 1), "")
        picture, *others = fn.external_source(
            source=source,
            num_outputs=1 + len(wanted),
            batch=True,
            dtype=[first[0], *kinds],
            ndim=[first[1], *dimensions],
            layout=[layout, *layouts],
            no_copy=True,
        )
    return picture, dict(zip(names, others, strict=True))


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
