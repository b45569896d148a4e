"""gpu-check keeps what was measured, whatever becomes of the rest."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from click.testing import CliRunner

from benchmarks import gpu_check
from benchmarks.gpu_check import Part, check, main, outcome, run_part

FIGURES = "import json, sys; open(sys.argv[sys.argv.index('--json') + 1], 'w').write(json.dumps({'ratios': {'a': 2}}))"


BEGUN = """
import sys, time
from pathlib import Path
from benchmarks.kept import Figures
kept = Figures(Path(sys.argv[sys.argv.index('--json') + 1]))
kept.so_far(rows=[1])
kept.so_far(rows=[1, 2])
time.sleep(60)
"""


def test_each_part_is_recorded_whether_it_passes_fails_or_hangs(tmp_path: Path):
    wanted = [
        Part("begun", ("-c", BEGUN), 5),
        Part("slow", ("-c", "import time; print('begun', flush=True); time.sleep(60)"), 2, figures=False),
        Part("good", ("-c", FIGURES), 60),
        Part("bad", ("-c", "print('what went wrong'); raise SystemExit(3)"), 60, figures=False),
    ]
    path, passed = check("NVIDIA H200 (simulated)", tmp_path, lambda name: None, wanted)
    assert not passed
    assert path.name.startswith("nvidia-h200-simulated-")
    written = json.loads(path.read_text())
    assert {"device", "driver", "cores", "python", "time", "packages"} <= set(written["machine"])
    found = written["parts"]
    assert [outcome(found[name]) for name in ("good", "bad", "slow")] == ["passed", "failed (3)", "stopped after 2 s"]
    assert outcome(found["begun"]) == "stopped after 5 s, its figures so far kept"
    assert found["begun"]["figures"] == {"unfinished": True, "rows": [1, 2]}
    assert found["good"]["figures"] == {"ratios": {"a": 2}}
    assert found["bad"]["output_tail"] == ["what went wrong"]
    assert found["slow"]["output_tail"][0] == "begun"
    assert found["slow"]["output_tail"][-1] == "KeyboardInterrupt", "it may say what it came to"
    assert 50 < found["good"]["limit_s"] <= 60, "the slow part left nothing of its time"
    assert 60 < found["bad"]["limit_s"] <= 120, "what a part leaves goes to the next"
    logs = [f"{path.stem}-{name}.log" for name in ("bad", "begun", "slow")]
    assert sorted(each.name for each in tmp_path.iterdir()) == sorted([path.name, *logs])
    assert (tmp_path / logs[0]).read_text() == "what went wrong\n"


def test_a_check_that_is_ended_ends_its_part_and_keeps_its_figures(tmp_path: Path):
    out, scratch = tmp_path / "out", tmp_path / "scratch"
    out.mkdir()
    scratch.mkdir()
    program = f"""
import signal, sys
from benchmarks import gpu_check
from benchmarks.gpu_check import Part
gpu_check.gpu_name = lambda: "NVIDIA H200 (simulated)"
gpu_check.gpu_memory = lambda: 0
gpu_check.parts = lambda *_: [Part("begun", ("-c", {BEGUN!r}), 50)]
gpu_check.main(["--out", {str(out)!r}])
"""
    environment = os.environ | {"TMPDIR": str(scratch)}
    process = subprocess.Popen([sys.executable, "-c", program], cwd=gpu_check.ROOT, env=environment)
    ends = time.monotonic() + 60
    while not any("2" in path.read_text() for path in scratch.rglob("*.json")) and time.monotonic() < ends:
        time.sleep(0.1)
    begun = psutil.Process(process.pid).children()
    process.terminate()
    assert process.wait(30) == 128 + 15
    (path,) = out.iterdir()
    found = json.loads(path.read_text())["parts"]["begun"]
    assert (found["status"], found["figures"]) == (None, {"unfinished": True, "rows": [1, 2]})
    assert not _runs(begun[0].pid)


WORKER = """
import subprocess, sys, time
worker = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
print(worker.pid, flush=True)
time.sleep(60)
"""


def test_what_a_stopped_part_has_started_is_stopped_with_it(tmp_path: Path):
    """Its workers would go on using the GPU beside the next part."""
    found = run_part(Part("workers", ("-c", WORKER), 3, figures=False), tmp_path, tmp_path / "workers.log")
    assert found["status"] is None
    pid = found["output_tail"][0]
    ends = time.monotonic() + 20  # a signal takes its time on a machine that is busy
    while _runs(int(pid)) and time.monotonic() < ends:
        time.sleep(0.05)
    assert not _runs(int(pid))


def _runs(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_all_its_parts_together_keep_to_the_eight_minutes():
    assert sum(part.most_s for part in gpu_check.parts("gpu")) <= gpu_check.TOTAL_S
    assert "tests/dali_pipes/test_gpu.py" in gpu_check.parts("gpu")[0].command
    for part in gpu_check.parts("gpu"):
        assert part.command[0] == "-m" or (gpu_check.ROOT / part.command[0]).is_file()


def test_parts_may_be_run_alone_and_an_unknown_one_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(gpu_check, "parts", lambda *_: [Part(name, ("-c", FIGURES), 60) for name in ("one", "two")])
    done = CliRunner().invoke(main, ["--out", str(tmp_path), "--device", "cpu", "--only", "two"])
    assert done.exit_code == 0, done.output
    (path,) = tmp_path.iterdir()
    assert list(json.loads(path.read_text())["parts"]) == ["two"]
    done = CliRunner().invoke(main, ["--device", "cpu", "--only", "three"])
    assert done.exit_code == 2
    assert "no part 'three'; they are one, two" in done.output


def test_without_a_gpu_it_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(gpu_check, "gpu_name", lambda: None)
    done = CliRunner().invoke(main, ["--out", str(tmp_path)])
    assert done.exit_code == 2
    assert "no NVIDIA GPU" in done.output
    assert list(tmp_path.iterdir()) == []
