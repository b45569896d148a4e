"""Nothing is lost and nothing leaks: kills, a full disk, a cluster that loses a worker, patient data."""

from __future__ import annotations

import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import psutil
import pydicom
import pytest

from preprocessing.convert import convert
from preprocessing.errors import StoreError
from preprocessing.manifest import open_store
from preprocessing.settings import ConvertSettings
from preprocessing.verify import verify
from tests.preprocessing.pictures import data_set, digest

ROOT = Path(__file__).resolve().parents[2]
SETTINGS = ConvertSettings(levels=("full", "64"), timeout_s=30)
RUN = """
import resource, sys
from pathlib import Path
from preprocessing.convert import convert
from preprocessing.errors import StoreError
from preprocessing.settings import ConvertSettings

if __name__ == "__main__":
    images, csv, out, limit = sys.argv[1:]
    if int(limit):
        resource.setrlimit(resource.RLIMIT_FSIZE, (int(limit), resource.RLIM_INFINITY))
    settings = ConvertSettings(levels=("full", "64"), timeout_s=30)
    try:
        convert(Path(images), Path(csv), Path(out), settings, workers=2, progress=lambda p: print(p.done, flush=True))
    except StoreError as error:
        print(error, flush=True)
        sys.exit(2)
"""


def start(data: tuple[Path, Path], out: Path, limit: int = 0) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", RUN, str(data[0]), str(data[1]), str(out), str(limit)],
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return data_set(tmp_path_factory.mktemp("data"), 24)


@pytest.fixture(scope="module")
def whole(data: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    out = tmp_path_factory.mktemp("whole") / "store"
    convert(*data, out, SETTINGS, workers=2)
    return digest(out)


@pytest.mark.slow
def test_a_run_killed_at_random_moments_is_completed_to_the_same_bytes(
    data: tuple[Path, Path], whole: dict[str, str], tmp_path: Path
) -> None:
    rng = random.Random(11)
    out = tmp_path / "store"
    for stop_at in [*sorted(rng.sample(range(1, 24), 2)), 24]:
        run = start(data, out)
        assert run.stdout is not None
        with run.stdout as printed:
            for line in printed:
                if int(line) >= stop_at:
                    break
            time.sleep(rng.uniform(0, 0.03))
            children = psutil.Process(run.pid).children(recursive=True) if run.poll() is None else []
            run.kill()
        run.wait()
        _, alive = psutil.wait_procs(children, timeout=20)
        assert not alive, "worker processes outlive a killed run"
    summary = convert(*data, out, SETTINGS, workers=2)
    assert summary.unchanged >= 20, "finished work was done again"
    assert digest(out) == whole
    assert not list((out / ".scratch").iterdir())


def test_a_kill_while_the_manifest_is_written_leaves_the_old_one(
    data: tuple[Path, Path], whole: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "store"
    convert(*data, out, SETTINGS, workers=2)

    def killed(_: int) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("preprocessing.files.os.fsync", killed)
        with pytest.raises(KeyboardInterrupt):
            convert(*data, out, SETTINGS, workers=2)
    assert digest(out) == whole


def test_a_full_disk_stops_the_run_with_one_line_and_the_next_completes_it(
    data: tuple[Path, Path], whole: dict[str, str], tmp_path: Path
) -> None:
    out = tmp_path / "store"
    largest = max(path.stat().st_size for path in _tiles_of(data, tmp_path / "probe"))
    run = start(data, out, limit=largest - 1)
    printed, _ = run.communicate(timeout=60)
    last = printed.splitlines()[-1]
    assert run.returncode == 2
    assert "cannot be written" in last
    assert "run the same command again" in last
    assert not [path for path in out.rglob("*") if path.name.endswith(".tmp")]
    assert not (out / "manifest.parquet").exists()
    convert(*data, out, SETTINGS, workers=2)
    assert digest(out) == whole


def _tiles_of(data: tuple[Path, Path], out: Path) -> Iterator[Path]:
    convert(*data, out, SETTINGS, workers=2)
    yield from (out / "tiles").rglob("*.tif")


def test_a_journal_that_cannot_be_written_is_one_clear_line(
    data: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> str:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("preprocessing.journal.Journal._write", full)
    with pytest.raises(StoreError, match="No space left on device"):
        convert(*data, tmp_path / "store", SETTINGS, workers=1)


CANARIES = ("CANARY^NAME", "19331122", "1.2.826.0.1.3680043.8.498.777", "CANARYID", "CANARY TEXT")


def _planted(path: Path, value: int) -> None:
    """A DICOM file with canaries in every text tag that a mammogram may have, and in private ones."""
    dataset = pydicom.Dataset()
    dataset.file_meta = pydicom.dataset.FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    dataset.file_meta.MediaStorageSOPClassUID = pydicom.uid.DigitalMammographyXRayImageStorageForPresentation
    dataset.file_meta.MediaStorageSOPInstanceUID = pydicom.uid.UID(CANARIES[2])
    name, date, uid, identifier, words = CANARIES
    for keyword in ("PatientName", "ReferringPhysicianName", "OperatorsName", "PerformingPhysicianName"):
        setattr(dataset, keyword, name)
    for keyword in ("PatientBirthDate", "StudyDate", "SeriesDate", "AcquisitionDate", "ContentDate"):
        setattr(dataset, keyword, date)
    for keyword in ("StudyInstanceUID", "SeriesInstanceUID", "SOPInstanceUID", "FrameOfReferenceUID"):
        setattr(dataset, keyword, uid)
    for keyword in ("PatientID", "OtherPatientIDs", "AccessionNumber", "StudyID"):
        setattr(dataset, keyword, identifier)
    for keyword in (
        "PatientComments", "StudyDescription", "SeriesDescription", "InstitutionName", "InstitutionAddress",
        "ProtocolName", "StationName", "ImageComments", "PatientAddress", "ManufacturerModelName", "DeviceSerialNumber",
        "ViewPosition", "ImageLaterality", "PresentationIntentType", "VOILUTFunction", "BurnedInAnnotation",
        "WindowCenterWidthExplanation",
    ):  # fmt: skip
        setattr(dataset, keyword, words)
    block = dataset.private_block(0x0009, words, create=True)
    block.add_new(1, "LO", words)
    block.add_new(2, "PN", name)
    dataset.Modality, dataset.SamplesPerPixel, dataset.PhotometricInterpretation = "MG", 1, "MONOCHROME2"
    dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit, dataset.PixelRepresentation = 16, 12, 11, 0
    pixels = np.random.default_rng(value).integers(0, 4096, (90, 70), dtype=np.uint16)
    dataset.Rows, dataset.Columns, dataset.PixelData = 90, 70, pixels.tobytes()
    path.parent.mkdir(parents=True, exist_ok=True)
    dataset.save_as(path, enforce_file_format=True)


def test_no_patient_data_reaches_any_output(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    images, out = tmp_path / "images", tmp_path / "store"
    with pydicom.config.disable_value_validation():
        for number in range(4):
            _planted(images / f"{number}.dcm", number)
    cut = (images / "0.dcm").read_bytes()
    (images / "cut.dcm").write_bytes(cut[: len(cut) - 3000])
    (images / "header.dcm").write_bytes(cut[:700])
    (images / "rubbish.dcm").write_bytes(cut[:400] + " ".join(CANARIES).encode() + cut[400:900])
    summary = convert(images, None, out, SETTINGS, workers=1)
    assert summary.images >= 4
    assert summary.rejected >= 2
    rows = open_store(out).manifest
    assert rows["patient_id"].nunique() == 1, "one patient's pictures share a pseudonym"
    captured = capfd.readouterr()
    said = "\n".join(
        [str(summary), caplog.text, captured.out, captured.err, rows.to_csv(), str(verify(open_store(out)))]
    )
    for path in sorted(out.rglob("*")):
        said += str(path.relative_to(out))
        if path.is_file():
            said += path.read_bytes().decode("latin-1")
    for canary in CANARIES:
        for spelling in {canary, *canary.split("^"), *canary.split()} - {""}:
            assert spelling not in said, spelling


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextmanager
def _cluster(folder: Path, workers: int) -> Iterator[tuple[str, list[subprocess.Popen[bytes]]]]:
    """A scheduler and workers as processes of their own on loopback."""
    address = f"tcp://127.0.0.1:{_free_port()}"
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    port = address.rpartition(":")[2]
    command = [
        sys.executable,
        "-m",
        "distributed.cli.dask_scheduler",
        "--host",
        "127.0.0.1",
        "--port",
        port,
        "--no-dashboard",
    ]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "env": env, "cwd": folder}
    processes = [subprocess.Popen(command, **quiet)]
    try:
        for number in range(workers):
            processes.append(
                subprocess.Popen(
                    [
                        sys.executable, "-m", "distributed.cli.dask_worker", address, "--nthreads", "1",
                        "--no-dashboard", "--name", f"w{number}", "--local-directory", str(folder),
                    ],
                    **quiet,
                )
            )  # fmt: skip
        yield address, processes[1:]
    finally:
        for process in processes:
            family = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
            process.kill()
            process.wait()
            for child in family:
                if child.is_running():
                    child.kill()


@pytest.mark.slow
def test_a_cluster_that_loses_a_worker_makes_the_same_store(
    data: tuple[Path, Path], whole: dict[str, str], tmp_path: Path
) -> None:
    pytest.importorskip("distributed")
    from distributed import Client

    seen = []
    with _cluster(tmp_path, 2) as (address, workers):
        with Client(address, timeout="40s", set_as_default=False) as client:
            client.wait_for_workers(2, timeout=60)

        def watch(state) -> None:
            seen.append(state.done)
            if state.done == 6:
                for process in [*psutil.Process(workers[0].pid).children(recursive=True), workers[0]]:
                    os.kill(process.pid, signal.SIGKILL)

        summary = convert(*data, tmp_path / "store", SETTINGS, scheduler=address, progress=watch)
    assert summary.converted == 24
    assert summary.rejected == 0
    assert seen == list(range(1, 25))
    assert digest(tmp_path / "store") == whole
