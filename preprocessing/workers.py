"""Run a function over many files in processes that may crash, hang or eat memory without taking the run down.

A sandbox is one worker process under a time and a memory limit. A machine runs one sandbox a core; a cluster runs one a
thread of its Dask workers. A file that ends its process is tried once more in a fresh one: only what fails alone is
blamed. Since damage to the heap can show some files after the one that did it, the files before a crash that did not
repeat are done again too, each in its own process.
"""

from __future__ import annotations

import atexit
import multiprocessing
import queue
import resource
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures import TimeoutError as TimedOut
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, closing, nullcontext, suppress
from dataclasses import dataclass, replace
from functools import cache
from itertools import islice
from multiprocessing import forkserver, resource_tracker, spawn
from multiprocessing.context import ForkServerContext, ForkServerProcess
from typing import Any

import psutil
from pebble import ProcessExpired, ProcessPool

from preprocessing import gpu_decode
from preprocessing.errors import InputError
from preprocessing.machine import available_cores
from preprocessing.settings import ConvertSettings

Task = Any
_NEIGHBOURS = 8  # files before an unexplained crash that are done again
_IN_FLIGHT = 4  # tasks a worker thread that wait on a cluster
_BROKEN_TRIES = 3  # times that a process may die unheard before its file is given up
_DEATHS = 3  # times that a cluster may lose the machine under one file before the file is given up


@dataclass(frozen=True)
class Limits:
    """What one file may cost. `gpu`: a process beside the workers decodes for them, see gpu_decode.py."""

    timeout_s: float = 120.0
    memory_mb: int = 4096
    gpu: bool = False
    files_per_process: int = 500

    @classmethod
    def of(cls, settings: ConvertSettings) -> Limits:
        """Those that a conversion's settings name."""
        return cls(settings.timeout_s, settings.memory_mb, settings.decode_on != "cpu")


@dataclass(frozen=True)
class Failure:
    """Why a file has no result: `timeout`, `crash` or `memory`, and what was seen."""

    reason: str
    detail: str


@dataclass(frozen=True)
class Outcome:
    """A task with its result, or with its failure; `again` where it takes the place of one that was told before."""

    task: Task
    result: Any = None
    failure: Failure | None = None
    seconds: float = 0.0
    again: bool = False


class Sandbox:
    """One worker process for `function(task)`, replaced when it dies, and every `files_per_process` tasks."""

    def __init__(self, function: Callable[[Task], Any], limits: Limits, gpu: gpu_decode.Address | None = None) -> None:
        self._function, self._limits, self._gpu = function, limits, gpu
        self._pool = self._fresh()
        self._recent: deque[Outcome] = deque(maxlen=_NEIGHBOURS)

    def run(self, task: Task) -> list[Outcome]:
        """The task's outcome, and before it those of earlier tasks that turned out differently when done again."""
        try:
            outcome = self._attempt(self._pool, task)
        except (ProcessExpired, BrokenProcessPool) as crash:
            if isinstance(crash, BrokenProcessPool):
                self.close()
                self._pool = self._fresh()
            outcome = self._alone(task)
            if outcome.failure is not None:
                self._recent.clear()
                return [outcome]
            again = [self._alone(earlier.task) for earlier in self._recent if earlier.failure is None]
            before = {id(earlier.task): repr(earlier.result) for earlier in self._recent}
            self._recent.clear()
            # By their texts: an unknown age is NaN, which is unequal to itself.
            changed = [replace(new, again=True) for new in again if repr(new.result) != before[id(new.task)]]
            return [*changed, outcome]
        self._recent.append(outcome)
        return [outcome]

    def close(self) -> None:
        """End the process."""
        self._pool.stop()
        self._pool.join()

    def _attempt(self, pool: ProcessPool, task: Task) -> Outcome:
        start = time.perf_counter()
        try:
            future = pool.schedule(self._function, args=(task,), timeout=self._limits.timeout_s)
        except RuntimeError as error:  # the pool broke while it stood idle
            raise BrokenProcessPool(str(error)) from None
        try:
            return Outcome(task, future.result(), seconds=time.perf_counter() - start)
        except TimedOut:
            return Outcome(task, failure=Failure("timeout", f"not done after {self._limits.timeout_s:g} s"))
        except MemoryError:
            return Outcome(task, failure=Failure("memory", f"needs more than {self._limits.memory_mb} MiB"))

    def _alone(self, task: Task) -> Outcome:
        # A process that dies before the pool has heard that it took the task breaks the pool without an exit code.
        for _ in range(_BROKEN_TRIES):
            pool = self._fresh()
            try:
                return self._attempt(pool, task)
            except ProcessExpired as crash:
                return Outcome(task, failure=Failure("crash", f"its process ended with {_ending(crash.exitcode)}"))
            except BrokenProcessPool:
                continue
            finally:
                pool.stop()
                pool.join()
        return Outcome(task, failure=Failure("crash", f"its process died at once, {_BROKEN_TRIES} times"))

    def _fresh(self) -> ProcessPool:
        return ProcessPool(
            max_workers=1,
            max_tasks=self._limits.files_per_process,
            initializer=_start,
            initargs=(self._limits.memory_mb, self._gpu),
            context=worker_context(),
        )


def run_local(
    function: Callable[[Task], Any],
    tasks: Iterable[Task],
    workers: int,
    limits: Limits,
    finish: Callable[[Any], Any] | None = None,
) -> Generator[Outcome, None, None]:
    """Outcomes of `function` over `tasks`, in the order in which they come, from `workers` processes (0: one a core).

    `finish` turns a result into what the outcome holds, in this process and while its worker is at the next task: for
    what waits and does not work, such as for a disk. A worker's results are finished in order.

    Tasks are drawn as they are needed, by the thread that takes the outcomes; nothing is kept of a task whose outcome
    was taken. Close the generator to end the processes early.
    """
    with gpu_decode.serving(worker_context()) if limits.gpu else nullcontext() as gpu:
        yield from _run_local(function, tasks, workers or available_cores(), limits, finish, gpu)


def _run_local(
    function: Callable[[Task], Any],
    tasks: Iterable[Task],
    count: int,
    limits: Limits,
    finish: Callable[[Any], Any] | None,
    gpu: gpu_decode.Address | None,
) -> Generator[Outcome, None, None]:
    source = iter(tasks)
    waiting: queue.SimpleQueue[Any] = queue.SimpleQueue()
    results: queue.SimpleQueue[Any] = queue.SimpleQueue()
    stop = object()

    def deliver(outcomes: list[Outcome]) -> None:
        try:
            results.put([_finished(outcome, finish) for outcome in outcomes])
        except BaseException as error:  # noqa: BLE001  raised again where the outcomes are taken
            results.put(error)

    def work() -> None:
        try:
            with closing(Sandbox(function, limits, gpu)) as sandbox, ThreadPoolExecutor(1) as finisher:
                while (task := waiting.get()) is not stop:
                    finisher.submit(deliver, sandbox.run(task))
        except BaseException as error:  # noqa: BLE001  as above
            results.put(error)

    threads = [threading.Thread(target=work, name=f"convert-{i}", daemon=True) for i in range(count)]
    for thread in threads:
        thread.start()
    try:
        in_flight = 0
        while True:
            for task in islice(source, 2 * count - in_flight):
                waiting.put(task)
                in_flight += 1
            if not in_flight:
                return
            outcomes = results.get()
            if isinstance(outcomes, BaseException):
                raise outcomes
            in_flight -= 1
            yield from outcomes
    finally:
        with suppress(queue.Empty):
            while True:
                waiting.get_nowait()
        for _ in threads:
            waiting.put(stop)
        for thread in threads:
            thread.join()


def run_cluster(
    function: Callable[[Task], Any],
    tasks: Iterable[Task],
    scheduler: str,
    limits: Limits,
    finish: Callable[[Any], Any] | None = None,
) -> Generator[Outcome, None, None]:
    """The same on the workers of a dask.distributed scheduler, each thread of them with a sandbox of its own. Results
    are finished on the machine that made them.

    Raises:
        InputError: dask is not installed, or no scheduler answers at the address.
    """
    try:
        from distributed import Client, KilledWorker, as_completed
    except ImportError:
        raise InputError("--scheduler needs dask.distributed: pip install 'mammopipe[cluster]'.") from None
    try:
        client: Any = Client(scheduler, timeout="10s", set_as_default=False)
    except (OSError, ValueError, TimeoutError) as error:
        raise InputError(f"--scheduler {scheduler}: no dask scheduler answers there ({error}).") from None
    with client:
        source = iter(tasks)
        deaths: dict[str, int] = {}
        pending: dict[str, Task] = {}
        completed = as_completed([], loop=client.loop)

        def submit(task: Task) -> None:
            future = client.submit(_in_sandbox, function, task, limits, finish, pure=False)
            pending[future.key] = task
            completed.add(future)

        def fill() -> None:
            threads = sum(client.nthreads().values())
            while len(pending) < _IN_FLIGHT * max(1, threads):
                task = next(source, None)
                if task is None:
                    return
                submit(task)

        fill()
        while pending:
            future = next(completed)
            task = pending.pop(future.key)
            try:
                outcomes = future.result()
            except KilledWorker:
                name = repr(task)
                deaths[name] = deaths.get(name, 0) + 1
                if deaths[name] < _DEATHS:
                    submit(task)
                    continue
                outcomes = [Outcome(task, failure=Failure("crash", "the cluster's workers died on it"))]
            future.release()
            yield from outcomes
            fill()


_sandboxes = threading.local()
_gpu_lock = threading.Lock()


@cache
def _opened_gpu() -> gpu_decode.Address | None:
    stack = ExitStack()
    atexit.register(stack.close)
    return stack.enter_context(gpu_decode.serving(worker_context()))


def _gpu_of_process() -> gpu_decode.Address | None:
    """The process that decodes for all sandboxes of a cluster's worker."""
    with _gpu_lock:
        return _opened_gpu()


def _in_sandbox(
    function: Callable[[Task], Any], task: Task, limits: Limits, finish: Callable[[Any], Any] | None
) -> list[Outcome]:
    """What a cluster's worker runs: the task in this thread's sandbox, made at the first call."""
    key = (function, limits)
    if getattr(_sandboxes, "key", None) != key:
        if hasattr(_sandboxes, "sandbox"):
            _sandboxes.sandbox.close()
        _sandboxes.sandbox, _sandboxes.key = Sandbox(function, limits, _gpu_of_process() if limits.gpu else None), key
        atexit.register(_sandboxes.sandbox.close)
    return [_finished(outcome, finish) for outcome in _sandboxes.sandbox.run(task)]


def _finished(outcome: Outcome, finish: Callable[[Any], Any] | None) -> Outcome:
    if finish is None or outcome.failure is not None:
        return outcome
    return replace(outcome, result=finish(outcome.result))


_prepared = spawn.get_preparation_data


class _Process(ForkServerProcess):
    """A process that does not import the program that starts it, as multiprocessing would have it: a worker needs
    nothing of that. One that loads torch would cost each worker seconds; one without `if __name__ == "__main__":` would
    run again in each; one read from standard input cannot be imported."""

    _starting = threading.Lock()

    @staticmethod
    def _Popen(process_obj: Any) -> Any:  # noqa: N802  multiprocessing's name
        thread = threading.get_ident()

        def without_main(name: str) -> dict[str, Any]:
            found = _prepared(name)
            if threading.get_ident() == thread:
                found = {key: value for key, value in found.items() if not key.startswith("init_main")}
            return found

        with _Process._starting:
            spawn.get_preparation_data = without_main
            try:
                return ForkServerProcess._Popen(process_obj)
            finally:
                spawn.get_preparation_data = _prepared


class _Context(ForkServerContext):
    Process = _Process


def worker_context() -> ForkServerContext:
    """How worker processes start. A fork of this process would inherit its threads' locks; the fork server has
    imported the code and no more."""
    _allow_children()
    context = _Context()
    context.set_forkserver_preload(["preprocessing.ingest"])
    # Ctrl-C is for the driver: the server, which ignores it only when it has imported, inherits that it is blocked.
    resource_tracker.ensure_running()  # which the server starts otherwise, and that would unblock it
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    return context


def _allow_children() -> None:
    """Dask's nanny starts its workers as daemons, which multiprocessing forbids to have children. Sandboxes end by
    themselves when their pool's pipes close, so the ban's reason, orphans, does not hold for them."""
    process = multiprocessing.current_process()
    if process.daemon:
        process._config["daemon"] = False  # pyright: ignore[reportAttributeAccessIssue]


def _start(memory_mb: int, gpu: gpu_decode.Address | None) -> None:
    """Runs first in a worker process, which has one core to itself: threads of OpenCV or BLAS would fight over the
    others' (two workers took 2.6 times as long a picture as one, by BLAS's threads that wait for work by spinning)."""
    import cv2
    from threadpoolctl import threadpool_limits

    gpu_decode.connect(gpu)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the driver's to handle
    cv2.setNumThreads(1)
    threadpool_limits(1)
    limit = psutil.Process().memory_info().vms + memory_mb * 2**20
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (limit if hard == resource.RLIM_INFINITY else min(limit, hard), hard))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _ending(code: int | None) -> str:
    if code is not None and code < 0:
        try:
            return signal.Signals(-code).name
        except ValueError:
            pass
    return f"exit status {code}"
