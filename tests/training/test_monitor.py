from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest

from preprocessing.errors import RunError
from preprocessing.progress import Progress
from training import monitor as monitor_module
from training.advice import advise
from training.config import MonitorSettings
from training.console import Console
from training.gpu import GpuReader
from training.monitor import TrainingMonitor, watched
from training.trackers import Tracker, flatten, numbers

FAST = MonitorSettings(interval_s=0.02)


class SimulatedNvml:
    """Answers like pynvml for machines that are not here: several GPUs, MIG, figures not given, a GPU lost."""

    NVML_PCIE_UTIL_RX_BYTES, NVML_TEMPERATURE_GPU, NVML_CLOCK_SM = 1, 0, 1

    def __getattribute__(self, name):
        found = super().__getattribute__(name)
        if not name.startswith("nvmlDeviceGet") or name in ("nvmlDeviceGetCount", "nvmlDeviceGetHandleByIndex"):
            return found

        def asked(handle, *arguments):
            if handle in self.lost:
                raise RuntimeError("GPU is lost")
            return found(handle, *arguments)

        return asked

    def __init__(self, count: int = 1, mig: bool = False, init_fails: bool = False) -> None:
        self.count, self.mig, self.init_fails = count, mig, init_fails
        self.lost: set[int] = set()
        self.reasons = 0

    def nvmlInit(self):
        if self.init_fails:
            raise OSError("NVML Shared Library Not Found")

    def nvmlShutdown(self):
        pass

    def nvmlSystemGetDriverVersion(self):
        return b"580.00"

    def nvmlDeviceGetCount(self):
        return self.count

    def nvmlDeviceGetHandleByIndex(self, index):
        return index

    def nvmlDeviceGetName(self, handle):
        return f"Simulated GPU {handle}"

    def nvmlDeviceGetMigMode(self, handle):
        if not self.mig:
            raise RuntimeError("Not Supported")
        return (1, 1)

    def nvmlDeviceGetMemoryInfo(self, handle):
        return SimpleNamespace(total=80 * 2**30, used=(handle + 1) * 2**30)

    def nvmlDeviceGetUtilizationRates(self, handle):
        if self.mig:
            raise RuntimeError("Not Supported")
        return SimpleNamespace(gpu=50 + handle)

    def nvmlDeviceGetPowerUsage(self, handle):
        return 300_000

    def nvmlDeviceGetTotalEnergyConsumption(self, handle):
        raise RuntimeError("Not Supported")

    def nvmlDeviceGetDecoderUtilization(self, handle):
        return [7, 1000]

    def nvmlDeviceGetCurrentClocksEventReasons(self, handle):
        return self.reasons

    def nvmlDeviceGetPcieThroughput(self, handle, counter):
        return 2048

    def nvmlDeviceGetTemperature(self, handle, sensor):
        return 60

    def nvmlDeviceGetClockInfo(self, handle, clock):
        return 1700

    def nvmlDeviceGetComputeRunningProcesses(self, handle):
        return [1, 2]


def test_every_gpu_is_read_in_plain_units():
    read = GpuReader(SimulatedNvml(count=2)).read()
    assert [gpu["memory_mb"] for gpu in read] == [1024, 2048]
    assert [gpu["utilisation"] for gpu in read] == [50, 51]
    assert read[0] | {"memory_mb": 0, "utilisation": 0} == {
        "memory_mb": 0,
        "utilisation": 0,
        "power_w": 300,
        "temperature_c": 60,
        "sm_clock_mhz": 1700,
        "decoder": 7,
        "pcie_in_mb_s": 2,
        "processes": 2,
    }


def test_figures_that_a_gpu_does_not_give_are_left_out():
    reader = GpuReader(SimulatedNvml(mig=True))
    assert "utilisation" not in reader.read()[0]
    assert "energy_j" not in reader.read()[0]
    assert reader.describe()[0]["mig"]


@pytest.mark.parametrize("nvml", [SimulatedNvml(init_fails=True), SimulatedNvml(count=0)])
def test_no_driver_and_no_gpu_are_harmless(nvml):
    reader = GpuReader(nvml)
    assert reader.read() == []
    assert reader.problem
    reader.close()


def test_a_gpu_lost_in_mid_run_says_so_and_ends_nothing():
    nvml = SimulatedNvml(count=2)
    reader = GpuReader(nvml)
    nvml.lost.add(1)
    assert reader.read()[1] == {"lost": True}
    assert reader.read()[0]["memory_mb"] == 1024


def test_a_gpu_that_does_not_give_its_memory_is_not_lost():
    nvml = SimulatedNvml()
    nvml.nvmlDeviceGetMemoryInfo = lambda handle: 1 / 0  # machines whose GPU shares the host's memory
    assert GpuReader(nvml).read()[0]["utilisation"] == 50
    with TrainingMonitor(None, FAST, nvml=nvml) as monitor:
        _wait_for_samples(monitor)
        assert monitor.line().endswith("GPU0 50 %")


def _wait_for_samples(monitor: TrainingMonitor) -> None:
    end = time.monotonic() + 20
    while monitor.summary()["samples"] < 3 and time.monotonic() < end:
        time.sleep(0.02)


class Kept(Tracker):
    def __init__(self):
        self.seen: list[tuple[str, dict[str, float], int]] = []
        self.closed = False

    def log(self, kind, figures, step):
        self.seen.append((kind, dict(figures), step))

    def close(self):
        self.closed = True


def test_samples_and_records_reach_the_file_and_the_trackers(tmp_path: Path):
    tracker = Kept()
    with TrainingMonitor(tmp_path, FAST, [tracker], nvml=SimulatedNvml()) as monitor:
        monitor.log("epoch", {"epoch": 0, "step": 12, "auroc": 0.75, "val_loss": float("nan")})
        _wait_for_samples(monitor)
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    epoch = next(record for record in records if record["kind"] == "epoch")
    assert epoch["auroc"] == 0.75
    assert epoch["val_loss"] is None  # JSON has no NaN
    resources = [record for record in records if record["kind"] == "resources"]
    assert len(resources) >= 3
    assert resources[0]["gpu0"]["utilisation"] == 50
    assert resources[0]["rss_mb"] > 10
    assert resources[0]["step"] == 12
    assert records[-1]["kind"] == "summary"
    assert ("epoch", {"epoch": 0.0, "auroc": 0.75}, 12) in tracker.seen
    assert tracker.closed


def test_summary_gives_means_and_peaks_of_every_figure():
    with TrainingMonitor(None, FAST, nvml=SimulatedNvml()) as monitor:
        _wait_for_samples(monitor)
        summary = monitor.summary()
    assert summary["gpu0.power_w_mean"] == 300
    assert summary["gpu0.memory_mb_peak"] == 1024


def _counted(monitor: TrainingMonitor, *gpus: dict[str, object]) -> dict[str, object]:
    for gpu in gpus:
        monitor._count({"cpu_percent": 100.0, "gpu0": gpu})
    with monitor.time("compute"):
        pass
    return monitor.summary()


def test_a_mean_is_of_the_samples_that_had_the_figure():
    found = _counted(
        TrainingMonitor(None, FAST, nvml=SimulatedNvml(count=0)),
        *[{"utilisation": 90, "power_w": 300.0}, *[{"lost": True}] * 3],
    )
    assert (found["gpu0.utilisation_mean"], found["gpu0.power_w_mean"], found["cpu_percent_mean"]) == (90, 300, 100)
    assert "The model itself" in str(found["advice"])


def test_the_peak_is_the_highest_of_all_samples():
    found = _counted(TrainingMonitor(None, FAST), *[{"memory_mb": each} for each in (100, 300, 200)])
    assert (found["gpu0.memory_mb_peak"], found["gpu0.memory_mb_mean"]) == (300, 200)


class SimulatedProcess:
    """Answers like psutil.Process."""

    def __init__(self, *children: SimulatedProcess) -> None:
        self.below = children
        self.user = self.system = self.rss = self.read = self.write = 0.0

    def children(self, recursive: bool = False) -> list[SimulatedProcess]:
        return [each for child in self.below for each in (child, *(child.children(True) if recursive else ()))]

    def oneshot(self):
        return nullcontext()

    def cpu_times(self):
        return SimpleNamespace(user=self.user, system=self.system)

    def memory_info(self):
        return SimpleNamespace(rss=self.rss)

    def io_counters(self):
        return SimpleNamespace(read_bytes=self.read, write_bytes=self.write)


def test_figures_are_rates_of_the_whole_process_tree(monkeypatch):
    grandchild = SimulatedProcess()
    process = SimulatedProcess(SimulatedProcess(grandchild))
    seconds, moved = [10.0], SimpleNamespace(bytes_sent=0, bytes_recv=0)
    monkeypatch.setattr(monitor_module, "time", SimpleNamespace(perf_counter=lambda: seconds[0]))
    monkeypatch.setattr(monitor_module, "available_memory", lambda: (1000, 250))
    monkeypatch.setattr(monitor_module.psutil, "net_io_counters", lambda: moved)
    counters = monitor_module._Counters(process)
    seconds[0], mib = 14.0, 2**20
    process.user, process.system, process.rss, process.read = 2.0, 1.0, 100 * mib, 8 * mib
    grandchild.user, grandchild.rss, grandchild.write = 5.0, 50 * mib, 4 * mib
    moved.bytes_sent, moved.bytes_recv = 2 * mib, 10 * mib
    assert counters.read() == {
        "cpu_percent": 200.0,  # 8 s in 4
        "rss_mb": 150.0,
        "ram_percent": 75.0,
        "disk_read_mb_s": 2.0,
        "disk_write_mb_s": 1.0,
        "network_mb_s": 3.0,
    }
    seconds[0] = 15.0
    assert counters.read()["cpu_percent"] == 0.0  # since the last reading


def test_a_cause_that_holds_a_gpu_down_counts_beside_whatever_others():
    others = ("", ", software thermal", ", hardware thermal", ", power brake", ", hardware slowdown")
    gpus = [{"utilisation": 90, "slowed_by": f"power cap{other}"} for other in others]
    found = _counted(TrainingMonitor(None, FAST, nvml=SimulatedNvml(count=0)), *gpus)
    assert "held down by its power cap:" in str(found["advice"])


def test_samples_of_a_run_that_goes_on_carry_its_step(tmp_path):
    with TrainingMonitor(tmp_path, MonitorSettings(interval_s=60), nvml=SimulatedNvml(), step=48):
        pass
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [48, 48]


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [
        ({"data": 3.0, "compute": 7.0}, "30% of the time is spent waiting for data"),
        ({"data": 0.1, "transfer": 3.0, "compute": 7.0}, "copying batches"),
        ({"data": 0.1, "compute": 9.9}, "The model itself limits this run"),
        ({}, "Too short to tell what limits it"),
    ],
)
def test_advice_tells_starvation_from_saturation(monkeypatch, seconds, expected):
    clock = [0.0]
    monkeypatch.setattr("training.monitor.time.perf_counter", lambda: clock[0])
    monitor = TrainingMonitor(None, FAST, nvml=SimulatedNvml(count=0))
    for phase, duration in seconds.items():
        with monitor.time(phase):
            clock[0] += duration
    assert expected in monitor.summary()["advice"]


TIMED = {"data": 0.01, "compute": 0.99}


@pytest.mark.parametrize(
    ("shares", "means", "slowed", "job", "expected"),
    [
        (TIMED, {"gpu0.utilisation_mean": 40.0}, {}, "train", "the GPU idles between kernels"),
        (TIMED, {"gpu0.utilisation_mean": 40.0}, {}, "predict", "kernels: try a larger --batch-size."),
        (TIMED, {"gpu0.utilisation_mean": 95.0}, {}, "train", "The model itself limits this run"),
        # Of several GPUs the busiest one is ours; the others' idling says nothing.
        (TIMED, {"gpu0.utilisation_mean": 0.0, "gpu1.utilisation_mean": 95.0}, {}, "train", "The model itself"),
        (TIMED, {"gpu0.utilisation_mean": 95.0}, {"power cap": 0.9}, "train", "held down by its power cap"),
        (TIMED, {"gpu0.utilisation_mean": 95.0}, {"power cap": 0.1}, "train", "The model itself limits this run"),
        # A starved GPU may well be capped now and then; what limits the run is the data.
        ({"data": 0.5, "compute": 0.5}, {}, {"power cap": 0.9}, "train", "waiting for data"),
        ({"data": 0.5, "compute": 0.5}, {}, {}, "predict", "--store"),
        ({}, {"cpu_percent_mean": 390.0}, {}, "convert", "All 4 cores are busy"),
        ({}, {"cpu_percent_mean": 100.0}, {}, "convert", "Only 25% of 4 cores are busy"),
    ],
)
def test_advice_names_what_limits_the_job(shares, means, slowed, job, expected):
    assert expected in advise(shares, means, slowed, cores=4, job=job)


def test_energy_counts_from_the_first_reading():
    nvml = SimulatedNvml(count=2)
    used = {0: 5_000_000, 1: 7_000_000}  # millijoules since the driver was loaded
    nvml.nvmlDeviceGetTotalEnergyConsumption = lambda handle: used[handle]
    reader = GpuReader(nvml)
    assert [gpu["energy_j"] for gpu in reader.read()] == [0, 0]
    used[1] += 250_000
    assert [gpu["energy_j"] for gpu in reader.read()] == [0, 250]


class Failing(Kept):
    def log(self, kind, figures, step):
        raise OSError("the server is away")


def test_a_tracker_that_fails_is_left_out_and_ends_nothing(tmp_path, caplog):
    good = Kept()
    with TrainingMonitor(tmp_path, MonitorSettings(interval_s=60), [Failing(), good]) as monitor:
        monitor.log("epoch", {"step": 1, "auroc": 0.5})
        monitor.log("epoch", {"step": 2, "auroc": 0.6})
    assert [(kind, step) for kind, _, step in good.seen if kind == "epoch"] == [("epoch", 1), ("epoch", 2)]
    assert len([record for record in caplog.records if "the server is away" in record.getMessage()]) == 1


class FailingAtTheEnd(Kept):
    def close(self):
        raise ConnectionError("the server is away")


def test_a_tracker_that_cannot_end_ends_nothing_else(tmp_path, caplog):
    good = Kept()
    monitor = TrainingMonitor(tmp_path, MonitorSettings(interval_s=60), [FailingAtTheEnd(), good])
    with pytest.raises(SystemExit, match="143"), monitor:
        raise SystemExit(143)
    assert good.closed
    assert "FailingAtTheEnd failed and is disabled for the rest of the run: the server is away" in caplog.text


def test_a_job_shorter_than_the_interval_is_measured_once(tmp_path):
    with TrainingMonitor(tmp_path, MonitorSettings(interval_s=60), nvml=SimulatedNvml()):
        pass
    kinds = [json.loads(line)["kind"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert kinds == ["resources", "summary"]
    summary = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-1])
    assert summary["cpu_percent_mean"] >= 0
    assert summary["advice"] == "Too short to tell what limits it."


def test_a_disk_that_is_full_ends_no_job_and_hides_no_error(tmp_path, caplog):
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    kept = Kept()
    monitor = TrainingMonitor(tmp_path, FAST, [kept])
    with pytest.raises(RunError, match="one clear line"), monitor:
        raise RunError("one clear line")
    assert kept.seen[-1][0] == "summary"
    told = [record.getMessage() for record in caplog.records if "no more is written" in record.getMessage()]
    assert told == [f"{tmp_path / 'metrics.jsonl'}: no more is written: No space left on device."]


def test_nothing_is_written_into_a_folder_that_is_not_there(tmp_path):
    with TrainingMonitor(tmp_path / "store", MonitorSettings(interval_s=60)):
        pass
    assert list(tmp_path.iterdir()) == []


def test_a_line_for_the_screen_has_cores_memory_and_gpus():
    nvml = SimulatedNvml(count=2)
    with TrainingMonitor(None, FAST, nvml=nvml) as monitor:
        assert monitor.line() == ""
        nvml.lost.add(1)
        _wait_for_samples(monitor)
        line = monitor.line()
    assert re.match(r"\d+\.\d of \d+ cores, RAM \d+\.\d GiB, GPU0 50 % 1\.0 GiB, GPU1 lost$", line)


def test_a_watched_job_ends_with_what_it_used(tmp_path, capsys):
    with Console(tmp_path) as console, watched(console, "Converting", "files", "convert", tmp_path) as (_, advance):
        advance(Progress(3, 3))
    told = capsys.readouterr().err
    assert "Converting: 3 of 3 files" in told
    assert re.search(r"Used \d+\.\d of \d+ cores on average, at most \d+\.\d GiB of RAM", told)


def test_watching_loads_no_torch():
    code = "import sys, training.monitor, training.console; print('torch' in sys.modules)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "False"


def test_throttling_is_told():
    nvml = SimulatedNvml()
    nvml.reasons = 0x40
    with TrainingMonitor(None, FAST, nvml=nvml) as monitor:
        with monitor.time("compute"):
            pass
        _wait_for_samples(monitor)
        assert "hardware thermal" in monitor.summary()["advice"]


def test_flatten_and_numbers_keep_finite_numbers_with_dotted_names():
    tree = {"a": {"b": 1, "c": "text"}, "d": float("inf"), "e": 2.5}
    assert flatten(tree) == {"a.b": 1, "a.c": "text", "d": float("inf"), "e": 2.5}
    assert numbers(tree) == {"a.b": 1.0, "e": 2.5}
