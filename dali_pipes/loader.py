"""Batches of torch tensors from a store: the plan's samples, through the graph, on the training device."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, nullcontext, suppress
from functools import partial
from itertools import islice
from typing import Any, NamedTuple

import cv2
import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray

from dali_pipes.cache import LevelCache, shared_cache
from dali_pipes.feed import Uses, feed
from dali_pipes.memory import give_back_freed_memory, keep_freed_memory
from dali_pipes.mixing import mix_batch
from dali_pipes.pipelines import host_pipeline, operator_pipeline
from dali_pipes.plan import Mixing, Plan
from dali_pipes.sampling import hard_rows, row_weights
from dali_pipes.settings import LoaderSettings, PipelineSettings
from dali_pipes.source import Fault, Source, require_patch_level
from dali_pipes.steps import HostSteps
from preprocessing.errors import StoreError, command_line
from preprocessing.machine import available_cores, processes_here
from preprocessing.manifest import Store

log = logging.getLogger(__name__)

Batch = dict[str, torch.Tensor]


_Prepared = tuple[Any, Fault | None]
# Of a GPU's steps the host works through a graph's operators one after the other, for longer than the GPU itself. So
# two graphs take the batches in turns.
_GRAPHS = {"cpu": 1, "gpu": 2}
_GPU_PARTS = 4  # of a batch, whose samples are prepared side by side; from a cache by Python alone, so in one


class _Fed(NamedTuple):
    """A batch on its way through a graph: its rows, what is wrong with some of them, and the arrays that the graph
    reads in place."""

    graph: int
    rows: NDArray[np.int64]
    faults: list[Fault]
    columns: Sequence[Any]
    mixing: Mixing | None


class Lent:
    """Buffers that a GPU may still read when the host has done with them, kept until it has come past that point.

    DALI frees a batch in the order of its own streams, and does not know what training's has queued on it; nor does
    torch know what DALI's have queued on a level that was uploaded.
    """

    def __init__(self) -> None:
        self._kept: deque[tuple[Any, Any]] = deque()

    def keep(self, buffers: Any, stream: Any) -> None:
        """Hold buffers for all that is queued on a CUDA stream; let go of those that it has come past."""
        with suppress(RuntimeError):  # a GPU that has failed reads nothing any more; who uses it next says so
            self._kept.append((buffers, stream.record_event()))
            while self._kept and self._kept[0][1].query():
                self._kept.popleft()

    def close(self) -> None:
        """Wait for the stream."""
        with suppress(RuntimeError):
            if self._kept:
                self._kept[-1][1].synchronize()
        self._kept.clear()


_Drawn = tuple[NDArray[np.int64], list[Fault], Sequence[Any], Mixing | None]


class Loader:
    """Batches of a store's rows, as dicts of `image` [B, C, H, W], float32 or as `pipeline.dtype` says, `label` float32
    [B], `index` int64 [B] and `ok` bool [B]; all on `device`.

    A context manager; many can be open at once. One epoch is iterated at a time.

    Args:
        store: the store.
        rows: of its manifest; `index` counts in them.
        pipeline: from tile to tensor.
        loader: how samples are drawn and delivered.
        seed: of the plan.
        train: shuffled, balanced and augmented, or in order, once each and as they are.
        device: "cpu", "cuda" or "cuda:N".
        rank, world_size: this process's share of each epoch.
    """

    def __init__(
        self,
        store: Store,
        rows: pd.DataFrame,
        pipeline: PipelineSettings,
        loader: LoaderSettings,
        *,
        seed: int = 42,
        train: bool = True,
        device: str = "cpu",
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        require_patch_level(store, pipeline)
        self._root, self._labels = store.root, rows["cancer"].to_numpy(np.float32)
        weights, hard = (row_weights(rows, loader), hard_rows(rows, loader)) if train else (None, None)
        self._plan = Plan(self._labels, loader, seed, train, pipeline.augment, rank, world_size, weights, hard)
        self._open_source = partial(Source, store, rows, pipeline)
        self._windows = rows[["voi_lut", "window_function"]]
        self._settings, self._pipeline_settings = loader, pipeline
        self._dtype = getattr(torch, pipeline.dtype)
        self._device = torch.device(device)
        self._is_on_gpu = self._device.type == "cuda"  # a batch
        self._threads = loader.threads or max(available_cores() // processes_here(), 1)
        self._pool: ThreadPoolExecutor | None = None
        self._resources = ExitStack()
        self.cache: LevelCache | None = None
        self._graphs: list[Any] = []
        self._steps: HostSteps | None = None
        self._feed: Iterator[_Drawn] = iter(())
        self._ahead: deque[tuple[NDArray[np.int64], list[Future[list[_Prepared]]], Mixing | None]] = deque()
        self._underway: deque[_Fed] = deque()
        self._lent = Lent()
        self._faults: dict[int, str] = {}
        self._epoch_running = 0
        self._closed = False
        self._parts = 1
        self.wait_s = 0.0

    @property
    def steps_per_epoch(self) -> int:
        """Batches of an epoch for this rank."""
        return self._plan.steps

    @property
    def bad_samples(self) -> dict[int, str]:
        """Rows whose tile could not be used so far, and why."""
        return dict(self._faults)

    def __len__(self) -> int:
        return self.steps_per_epoch

    def __enter__(self) -> Loader:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the graphs, their threads and their memory, for good."""
        self._epoch_running += 1
        self._closed = True
        with suppress(RuntimeError):  # of a graph that has failed, which the epoch has raised
            self._end_epoch()
        self._lent.close()
        self._graphs.clear()
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
            self._pool = None
        self._resources.close()
        if self._steps is not None:
            give_back_freed_memory()

    def drawn(self, epoch: int, steps: int | None = None) -> dict[str, int]:
        """{"negative": n, "positive": n}: what an epoch, or its first steps, really give, over all ranks."""
        return self._plan.drawn(epoch, steps)

    def epoch(self, epoch: int, start_step: int = 0) -> Iterator[Batch]:
        """The epoch's batches from `start_step` on.

        Raises:
            StoreError: more than `max_bad_samples` rows have damaged tiles; names them.
            RuntimeError: the loader was closed, or another epoch of it begun.
        """
        self._open()
        self._end_epoch()
        self._epoch_running += 1
        running = self._epoch_running
        self._feed = self._batches(epoch, start_step)
        began = time.monotonic()
        idle = deque(range(len(self._graphs)))  # those with room for a batch, in their turns
        while self._run(idle, wait=True):
            fed = self._underway[0]  # in the order in which the graphs asked for them
            image = self._take(fed)
            batch = self._batch(image, fed)
            idle.append(fed.graph)
            self._run(idle, wait=False)
            self.wait_s += time.monotonic() - began
            try:
                yield batch
            finally:  # all that uses the batch is queued by now, unless who asked for it still has it
                if self._is_on_gpu:
                    self._lent.keep((image, fed.columns), torch.cuda.current_stream(self._device))
            if running != self._epoch_running:
                raise RuntimeError("this loader was closed, or another epoch of it begun, before this one ended")
            began = time.monotonic()
        for graph in self._graphs:
            graph.reset()
        if self.cache is not None:
            log.info("Cache: %s.", self.cache)

    def _open(self) -> None:
        if self._closed:
            raise RuntimeError("this loader was closed")
        if self._graphs:
            return
        settings, gpu_steps = self._settings, self._is_on_gpu and self._settings.steps_on == "auto"
        if self._is_on_gpu and self._device.index is None:
            self._device = torch.device("cuda", torch.cuda.current_device())
        self._pool = ThreadPoolExecutor(self._threads, thread_name_prefix="loader")
        on_device = gpu_steps and settings.cache == "device"
        # In training's stream what prepares levels would stand behind all that is queued there, and wait for it.
        self._stream = torch.cuda.Stream(self._device) if on_device else None
        if settings.cache != "none":
            place = str(self._device) if on_device else "cpu"
            self.cache = self._resources.enter_context(shared_cache(place, settings.cache_mb << 20))
        encoded = gpu_steps and self.cache is None
        upload = self._upload if on_device else None
        self._source = self._open_source(self.cache, upload, encoded, whole=gpu_steps and not encoded)
        size, count = self._plan.batch_size, _GRAPHS["gpu" if gpu_steps else "cpu"]
        amounts = size, -(-self._threads // count), -(-settings.prefetch // count)
        if gpu_steps:
            self._parts = _GPU_PARTS if self.cache is None else 1
            rows = self._windows.to_dict("records")
            self._uses = Uses.of(rows, self._pipeline_settings, self._plan.augment, encoded)
        else:
            self._parts = size  # each thread takes the next sample, for some are quicker than others
            keep_freed_memory(for_good=False)  # pictures and batches come and go
            cv2.setNumThreads(1)  # samples run side by side; OpenCV's own threads would fight over the same cores
            self._steps = HostSteps(self._pipeline_settings)
        for graph in range(count):
            source = self._source_of(graph)
            if gpu_steps:
                given = (source, self._pipeline_settings, self._uses, *amounts)
                self._graphs.append(operator_pipeline(*given, self._device.index, not encoded, self._stream))
            else:
                device_id = self._device.index if self._is_on_gpu else None
                self._graphs.append(host_pipeline(source, self._pipeline_settings, *amounts, device_id))

    def _upload(self, level: NDArray[np.uint16]) -> torch.Tensor:
        return torch.from_numpy(level.view(np.int16)).to(self._device)

    def _end_epoch(self) -> None:
        """Throw away what is still on its way, and make the graphs ready for another epoch."""
        self._feed = iter(())
        self._ahead.clear()
        for graph in self._graphs:
            while not graph.empty():
                graph.share_outputs()
                graph.release_outputs()
                graph.schedule_run()
            # Finds the end: before that a reset does nothing, and the next epoch's first run would not fill its depth.
            graph.schedule_run()
            graph.reset()
        self._underway.clear()

    def _source_of(self, graph: int) -> Callable[[], Any]:
        """What a graph calls when it has room for a batch; StopIteration ends its epoch."""

        def next_fed() -> Any:
            fed = _Fed(graph, *next(self._feed))
            self._underway.append(fed)
            return fed.columns

        return next_fed

    def _batches(self, epoch: int, start_step: int) -> Iterator[_Drawn]:
        """Rows and samples, prepared `prefetch` batches ahead of those that the graphs have taken on."""
        assert self._pool is not None
        order, steps = self._plan.order(epoch), iter(range(start_step, self._plan.steps))
        ahead = self._ahead = deque()
        try:
            while True:
                for step in islice(steps, self._settings.prefetch + 1 - len(ahead)):
                    places = self._plan.places(step)
                    parts = np.array_split(places, min(len(places), self._parts))
                    jobs = [self._pool.submit(self._samples, epoch, order[part], part) for part in parts]
                    ahead.append((order[places], jobs, self._plan.mixing(epoch, places)))
                if not ahead:
                    return
                rows, jobs, mixing = ahead.popleft()
                samples, faults = zip(*(each for job in jobs for each in job.result()), strict=True)
                yield rows, [fault for fault in faults if fault], self._columns(samples), mixing
        finally:  # of an epoch that is left: what waits would hold up the next one
            for _, jobs, _ in ahead:
                for job in jobs:
                    job.cancel()

    def _run(self, idle: deque[int], wait: bool) -> bool:
        """Have idle graphs take on the batches whose samples are ready, or, to `wait`, one at least; whether any batch
        is under way. A graph that takes one on holds up its caller until the samples are there; its first run of an
        epoch takes as many on as it is deep."""
        while idle and (self._is_next_ready() or (wait and not self._underway)):
            self._graphs[idle.popleft()].schedule_run()
        return bool(self._underway)

    def _is_next_ready(self) -> bool:
        """Whether the next batch's samples, or the epoch's end, are there."""
        return not self._ahead or all(job.done() for job in self._ahead[0][1])

    def _samples(self, epoch: int, rows: NDArray[np.int64], places: NDArray[np.int64]) -> list[_Prepared]:
        """Some samples, or where the host has the steps their pictures, all done; and what is wrong with them."""
        found: list[_Prepared] = []
        with nullcontext() if self._stream is None else torch.cuda.stream(self._stream):
            for row, place in zip(rows.tolist(), places.tolist(), strict=True):
                sample, fault = self._source.sample(row, self._plan.sample(epoch, place))
                found.append((sample if self._steps is None else self._steps(*sample), fault))
        if self._stream is not None:
            self._stream.synchronize()
        return found

    def _columns(self, samples: Sequence[Any]) -> Sequence[Any]:
        """What a graph is fed with of a batch."""
        return list(samples) if self._steps else feed(samples, self._uses, self._pipeline_settings)

    def _take(self, fed: _Fed) -> torch.Tensor:
        """A batch's pictures that a graph has ready, or will have."""
        graph = self._graphs[fed.graph]
        stream = torch.cuda.current_stream(self._device) if self._is_on_gpu else None
        (output,) = graph.share_outputs(cuda_stream=stream)
        # The dynamic executor's buffers are the tensor's own from here on; nothing is copied.
        image = torch.from_dlpack(output.as_tensor())
        graph.release_outputs()
        self._underway.popleft()
        return image

    def _batch(self, image: torch.Tensor, fed: _Fed) -> Batch:
        """The pictures with all that belongs to them."""
        ok = np.ones(len(fed.rows), bool)
        for fault in fed.faults:
            ok[fed.rows == fault.row] = False
            self._faults[fault.row] = fault.reason
        self._check_budget()
        facts = {"label": self._labels[fed.rows], "index": fed.rows, "ok": ok}
        # Not blocking: a copy that did would wait for all that training has queued on the device.
        placed = {name: torch.from_numpy(v).to(self._device, non_blocking=True) for name, v in facts.items()}
        batch = {"image": image, **placed}
        mixed = mix_batch(batch, fed.mixing) if fed.mixing else batch
        # Here and not in the graph: DALI's conversion to float16 on a CPU takes ten times as long as torch's.
        return mixed | {"image": mixed["image"].to(self._dtype)}

    def _check_budget(self) -> None:
        most = self._settings.max_bad_samples
        if len(self._faults) > most:
            listed = "\n".join(f"  {reason}" for _, reason in sorted(self._faults.items()))
            raise StoreError(
                f"{len(self._faults)} damaged tiles, more than data.loader.max_bad_samples = {most} allows. Mend the "
                f"store that they are in with: {command_line(f'convert --repair --out {self._root}')}, and the "
                f"--images and --csv that it was made from\n{listed}"
            )
