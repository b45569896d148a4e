"""One bad file costs that file alone: crashes, hangs and hogs among good neighbours."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
from threadpoolctl import threadpool_info

from preprocessing import workers
from preprocessing.workers import Limits, run_local

ROOT = Path(__file__).resolve().parents[2]
LIMITS = Limits(timeout_s=3.0, memory_mb=512)


def work(task: tuple[str, int]) -> int:
    kind, number = task
    if kind == "segfault":
        ctypes.string_at(0)
    if kind == "abort":
        os.abort()
    if kind == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if kind == "hang":
        time.sleep(3600)
    if kind == "hog":
        return len(bytearray(4 * 2**30))
    if kind == "raise":
        raise ZeroDivisionError
    if kind == "threads":
        np.linalg.lstsq(np.eye(3), np.ones(3), rcond=None)
        return max(library["num_threads"] for library in threadpool_info())
    return number**2


def test_a_crash_a_hang_and_a_hog_among_forty_cost_one_file_each() -> None:
    bad = {7: "segfault", 13: "hang", 21: "hog", 30: "abort", 35: "kill"}
    tasks = [(bad.get(number, "good"), number) for number in range(40)]
    outcomes = {outcome.task[1]: outcome for outcome in run_local(work, tasks, 2, LIMITS)}
    assert sorted(outcomes) == list(range(40))
    for number, outcome in outcomes.items():
        if number not in bad:
            assert outcome.result == number**2
            assert outcome.failure is None
    failures = {number: outcomes[number].failure for number in bad}
    reasons = {number: failure.reason for number, failure in failures.items() if failure is not None}
    assert reasons == {7: "crash", 13: "timeout", 21: "memory", 30: "crash", 35: "crash"}
    assert failures[7] is not None
    assert "SIGSEGV" in failures[7].detail


THREADS = """
from preprocessing.workers import run_local
from tests.preprocessing.test_workers import LIMITS, work

(outcome,) = run_local(work, [("threads", 0)], 1, LIMITS)
print(work(("threads", 0)), outcome.result)
"""


def test_a_worker_computes_in_one_thread() -> None:
    """BLAS takes a thread a core of the machine, which wait for work by spinning: those of all workers fight."""
    environment = os.environ | {"OMP_NUM_THREADS": "2"}
    command = [sys.executable, "-c", THREADS]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["2", "1"]


def crash_after_spoiling(task: tuple[Path, str]) -> str:
    """Task `spoiler` spoils its process, and crashes when alone; the next task in a spoiled process dies."""
    folder, name = task
    spoiled = folder / f"spoiled-{os.getpid()}"
    if spoiled.exists():
        os.abort()
    if name == "spoiler":
        if (folder / "ran").exists():
            os.abort()
        (folder / "ran").touch()
        spoiled.touch()
    return name


def test_a_crash_that_shows_in_the_next_file_is_laid_to_the_file_that_did_it(tmp_path: Path) -> None:
    names = ["a", "b", "spoiler", "victim", "c"]
    outcomes = {}
    for outcome in run_local(crash_after_spoiling, [(tmp_path, name) for name in names], 1, LIMITS):
        assert outcome.again == (outcome.task[1] in outcomes)  # a later outcome of the same task counts
        outcomes[outcome.task[1]] = outcome
    assert {name: outcome.result for name, outcome in outcomes.items()} == {
        "a": "a",
        "b": "b",
        "spoiler": None,
        "victim": "victim",
        "c": "c",
    }
    assert outcomes["spoiler"].failure is not None
    assert outcomes["spoiler"].failure.reason == "crash"


def test_an_error_of_the_function_reaches_the_caller() -> None:
    with pytest.raises(ZeroDivisionError):
        list(run_local(work, [("good", 1), ("raise", 2), ("good", 3)], 2, LIMITS))


def test_an_error_of_the_task_source_reaches_the_caller() -> None:
    def tasks():
        yield ("good", 1)
        raise KeyError("table")

    with pytest.raises(KeyError, match="table"):
        list(run_local(work, tasks(), 2, LIMITS))


def test_tasks_are_drawn_as_they_are_needed() -> None:
    drawn = 0

    def tasks():
        nonlocal drawn
        for number in range(10_000):
            drawn += 1
            yield ("good", number)

    with closing(run_local(work, tasks(), 2, LIMITS)) as outcomes:
        for _ in range(10):
            next(outcomes)
    assert drawn < 100


@pytest.mark.parametrize("from_a_file", [True, False])
def test_workers_do_not_run_the_program_that_starts_them(tmp_path: Path, from_a_file: bool) -> None:
    """Neither one without `if __name__ == "__main__":` nor one from standard input."""
    program = (
        "from tests.preprocessing.test_workers import LIMITS, run_local, work\n"
        "print('run')\n"
        "print([outcome.failure for outcome in run_local(work, [('good', 1), ('good', 2)], 2, LIMITS)])\n"
    )
    (tmp_path / "program.py").write_text(program)
    done = subprocess.run(
        [sys.executable, str(tmp_path / "program.py") if from_a_file else "-"],
        input=None if from_a_file else program,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
        cwd=ROOT,
    )
    assert done.stdout == "run\n[None, None]\n", done.stderr


CONTEXT = """
import signal, time
from preprocessing.workers import worker_context
signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell has background jobs ignore
try:
    worker_context()
    print("started", flush=True)
    time.sleep(60)
except KeyboardInterrupt:
    pass
"""


def test_ctrl_c_while_the_workers_server_is_still_importing_is_silent() -> None:
    """A terminal sends it to all of a command's processes."""
    piped = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    command = [sys.executable, "-c", CONTEXT]
    with subprocess.Popen(command, cwd=ROOT, start_new_session=True, **piped) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "started\n"
        time.sleep(0.2)  # its imports take longer
        os.killpg(process.pid, signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    assert errors == ""


@pytest.mark.parametrize("breaks", [1, 100])
def test_a_pool_that_breaks_before_it_knows_its_task_costs_that_task_at_most(monkeypatch, breaks):
    """The race in which a worker dies before the pool has heard that it took the task, played out on purpose."""
    schedule, left = workers.ProcessPool.schedule, [breaks]

    def broken(pool, function, args, timeout):
        if args[0][1] == 2 and left[0]:
            left[0] -= 1
            future = Future()
            future.set_exception(BrokenProcessPool("All workers expired"))
            return future
        return schedule(pool, function, args=args, timeout=timeout)

    monkeypatch.setattr(workers.ProcessPool, "schedule", broken)
    outcomes = {outcome.task[1]: outcome for outcome in run_local(work, [("good", n) for n in range(5)], 1, LIMITS)}
    assert {n: o.result for n, o in outcomes.items() if n != 2} == {0: 0, 1: 1, 3: 9, 4: 16}
    if breaks == 1:
        assert outcomes[2].result == 4
    else:
        assert outcomes[2].failure is not None
        assert outcomes[2].failure.reason == "crash"
