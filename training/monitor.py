"""Watches what a job costs: a thread samples GPUs (NVML) and this process tree (psutil); phases add up the waiting."""

from __future__ import annotations

import json
import logging
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

from preprocessing.machine import available_cores, available_memory
from preprocessing.progress import Progress
from training.advice import Job, advise
from training.config import MonitorSettings
from training.console import Console
from training.gpu import GpuReader
from training.run_files import plain
from training.runs import RECORDS
from training.trackers import Tracker, numbers

TELLING = 3  # samples from which on they say what limits a job
log = logging.getLogger(__name__)


class TrainingMonitor:
    """Samples resources in the background, times phases, and writes records to metrics.jsonl and the trackers.

    Use as a context manager. It never fails a job: where there is no NVIDIA driver it watches the rest, and a tracker
    that fails is dropped with a warning.
    """

    def __init__(
        self,
        directory: Path | None,
        settings: MonitorSettings,
        trackers: Sequence[Tracker] = (),
        nvml: Any = None,
        job: Job = "train",
        step: int = 0,
    ) -> None:
        """
        Args:
            directory: where metrics.jsonl is; nothing is written before the folder is there. None writes no file.
            settings: how often to sample.
            trackers: further sinks of the figures.
            nvml: the pynvml module, or something that answers like it.
            job: what is watched; the advice depends on it.
            step: where it begins, for samples before the first record.
        """
        self._path = directory / RECORDS if directory is not None else None
        self._interval = settings.interval_s
        self._trackers = list(trackers)
        self._job: Job = job
        self._cores = available_cores()
        self._gpus = GpuReader(nvml)
        self._lock = threading.Lock()
        self._seconds: defaultdict[str, float] = defaultdict(float)
        self._samples = 0
        self._sums: defaultdict[str, float] = defaultdict(float)
        self._peaks: dict[str, float] = {}
        self._latest: dict[str, Any] = {}
        self._counts: Counter[str] = Counter()  # samples that had a figure: GPUs do not give each one always
        self._slowed: Counter[str] = Counter()
        self._step = step

    def __enter__(self) -> TrainingMonitor:
        self._process = psutil.Process()
        self._counters = _Counters(self._process)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="monitor", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        self._thread.join(timeout=5)
        if not self._samples:  # a job that is over before the first sample was due
            self._take()
        self.log("summary", self.summary())
        for tracker in list(self._trackers):
            with self._dropped_if_it_fails(tracker):
                tracker.close()
        self._gpus.close()

    def log(self, kind: str, record: Mapping[str, Any]) -> None:
        """Append one line to metrics.jsonl and hand the record's numbers to the trackers."""
        self._step = int(record.get("step", self._step))
        line = json.dumps(plain({"kind": kind, "time": round(time.time(), 3), "step": self._step, **record}))
        with self._lock:
            self._append(line)
            figures = numbers({name: value for name, value in record.items() if name != "step"})
            for tracker in list(self._trackers):
                with self._dropped_if_it_fails(tracker):
                    tracker.log(kind, figures, self._step)

    @contextmanager
    def _dropped_if_it_fails(self, tracker: Tracker) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # noqa: BLE001 - a server that is away; each tracker has errors of its own
            self._trackers.remove(tracker)
            log.warning("%s failed and is disabled for the rest of the run: %s", type(tracker).__name__, error)

    def _append(self, line: str) -> None:
        if self._path is None or not self._path.parent.is_dir():
            return
        try:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(line + "\n")
        except OSError as error:
            log.warning("%s: no more is written: %s.", self._path, error.strerror)
            self._path = None

    @contextmanager
    def time(self, phase: str) -> Iterator[None]:
        """Add the block's seconds to a phase: "data" (waiting for it), "transfer" or "compute"."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self._seconds[phase] += time.perf_counter() - start

    def line(self) -> str:
        """The latest sample in a few words, for the screen: cores, RAM, and each GPU's utilisation and memory."""
        sample = self._latest
        if not sample:
            return ""
        words = [f"{sample['cpu_percent'] / 100:.1f} of {self._cores} cores", f"RAM {_gib(sample['rss_mb'])}"]
        for name, gpu in sample.items():
            if isinstance(gpu, dict):
                busy = f"{gpu['utilisation']:.0f} % " if "utilisation" in gpu else ""
                held = _gib(gpu["memory_mb"]) if "memory_mb" in gpu else ""
                words.append(f"{name.upper()} {'lost' if gpu.get('lost') else (busy + held).strip()}")
        return ", ".join(words)

    def summary(self) -> dict[str, Any]:
        """Means and peaks of every figure, shares of the phases, and one sentence on what limits the job."""
        with self._lock:
            means = {f"{name}_mean": total / self._counts[name] for name, total in self._sums.items()}
            figures = means | {f"{name}_peak": peak for name, peak in self._peaks.items()}
            slowed = {reason: count / self._samples for reason, count in self._slowed.items()}
        total = sum(self._seconds.values())
        shares = {phase: seconds / total for phase, seconds in self._seconds.items()} if total else {}
        return {
            **{name: round(value, 2) for name, value in sorted(figures.items())},
            "samples": self._samples,
            "shares": {phase: round(share, 4) for phase, share in shares.items()},
            "advice": advise(shares, means if self._samples >= TELLING else {}, slowed, self._cores, self._job),
        }

    def outcome(self) -> str:
        """The summary for a person: means, peaks and the advice, a line or two."""
        if not self._samples:
            self._take()
        found = self.summary()
        if not self._samples:
            return str(found["advice"])
        words = [
            f"{found['cpu_percent_mean'] / 100:.1f} of {self._cores} cores on average",
            f"at most {_gib(found['rss_mb_peak'])} of RAM",
        ]
        words += [
            f"{name.split('.')[0].upper()} {value:.0f} % on average"
            for name, value in found.items()
            if name.endswith(".utilisation_mean")
        ]
        return f"Used {', '.join(words)}. {found['advice']}"

    def _watch(self) -> None:
        while not self._stop.wait(self._interval):
            self._take()

    def _take(self) -> None:
        try:
            sample: dict[str, Any] = {**self._counters.read()}
        except psutil.Error:  # the process tree changed under the reader
            return
        sample |= {f"gpu{index}": figures for index, figures in enumerate(self._gpus.read())}
        self._latest = sample
        self._count(sample)
        self.log("resources", sample)

    def _count(self, sample: Mapping[str, Any]) -> None:
        with self._lock:
            self._samples += 1
            for name, value in numbers(sample).items():
                self._sums[name] += value
                self._counts[name] += 1
                self._peaks[name] = max(value, self._peaks.get(name, value))
            gpus = [figures for figures in sample.values() if isinstance(figures, dict)]
            self._slowed.update(
                {reason for gpu in gpus if "slowed_by" in gpu for reason in gpu["slowed_by"].split(", ")}
            )


@contextmanager
def watched(
    console: Console, label: str, unit: str, job: Job, directory: Path | None = None
) -> Iterator[tuple[TrainingMonitor, Callable[[Progress], None]]]:
    """Watch a job that is no training: its monitor, and what shows progress with the monitor's figures beside it."""
    with (
        TrainingMonitor(directory, MonitorSettings(), job=job) as monitor,
        console.progress(label, unit, monitor.line) as advance,
    ):
        yield monitor, advance
    console.print(monitor.outcome())


class _Counters:
    """CPU, memory and traffic of this process and its children, as rates between two readings."""

    def __init__(self, process: psutil.Process) -> None:
        self._process = process
        self._before = self._totals(), time.perf_counter()

    def read(self) -> dict[str, float]:
        """cpu_percent (100 is one core), rss_mb, ram_percent, disk and network MiB/s."""
        totals, now = self._totals(), time.perf_counter()
        (before, then), self._before = self._before, (totals, now)
        seconds = max(now - then, 1e-6)
        total, free = available_memory()
        rates = {name: max(0.0, totals[name] - before[name]) / seconds for name in totals if name != "rss_mb"}
        return {
            "cpu_percent": round(100 * rates["cpu"], 1),
            "rss_mb": round(totals["rss_mb"], 1),
            "ram_percent": round(100 * (1 - free / total), 1),
            "disk_read_mb_s": round(rates["read"], 2),
            "disk_write_mb_s": round(rates["write"], 2),
            "network_mb_s": round(rates["network"], 2),
        }

    def _totals(self) -> dict[str, float]:
        cpu = rss = read = write = 0.0
        for process in [self._process, *self._process.children(recursive=True)]:
            try:
                with process.oneshot():
                    times = process.cpu_times()
                    cpu += times.user + times.system
                    rss += process.memory_info().rss
                    traffic = process.io_counters()
                    read, write = read + traffic.read_bytes, write + traffic.write_bytes
            except psutil.Error:
                continue
        network = psutil.net_io_counters()
        moved = network.bytes_sent + network.bytes_recv if network else 0
        mib = 2**20
        return {"cpu": cpu, "rss_mb": rss / mib, "read": read / mib, "write": write / mib, "network": moved / mib}


def _gib(mib: float) -> str:
    return f"{mib / 1024:.1f} GiB"
