"""What this machine has, which device the pipeline will use, and whether the main job can run here."""

from __future__ import annotations

import importlib
import importlib.metadata
import platform
import shutil
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from preprocessing import machine
from preprocessing.errors import command_line
from training.gpu import GpuReader

NEEDED_PACKAGES = ("nvidia-dali-cuda120", "torch", "torchvision", "timm", "pydicom", "dicomsdl", "nvidia-ml-py")
GIB = 2**30


@dataclass(frozen=True)
class Check:
    """One thing looked at. `needed` and not `ok` means that the main job cannot run."""

    name: str
    found: str
    ok: bool = True
    needed: bool = True
    advice: str = ""


def examine(folder: Path = Path()) -> list[Check]:
    """Look at everything; `folder` is where stores and runs would lie."""
    checks = [_python(), _cores(), _memory(), _disk(folder)]
    checks += [_package(name) for name in NEEDED_PACKAGES]
    checks += [_gpus(), _guarded("torch", _torch), _guarded("DALI pipeline", _dali)]
    checks += _decoders()
    return [*checks, _guarded("device used", _device), _codec()]


def usable(checks: Sequence[Check]) -> bool:
    """Whether the main job can run on this machine."""
    return all(check.ok for check in checks if check.needed)


def as_rows(checks: Sequence[Check]) -> list[dict[str, str]]:
    """The checks as rows of a table."""
    marks = {(True, True): "yes", (True, False): "yes", (False, True): "NO", (False, False): "no"}
    return [
        {"what": c.name, "ok": marks[c.ok, c.needed], "found": c.found + (f" - {c.advice}" if c.advice else "")}
        for c in checks
    ]


def _python() -> Check:
    right = (3, 11) <= sys.version_info[:2] <= (3, 13)
    system = f"{platform.python_version()} on {platform.system()} {platform.machine()}"
    return Check("Python", system, right, advice="" if right else "3.11 to 3.13 is needed: dicomsdl has no others.")


def _cores() -> Check:
    return Check("cores", str(machine.available_cores()))


def _memory() -> Check:
    memory = machine.available_memory()
    enough = memory.free > 3 * GIB
    found = f"{memory.free / GIB:.1f} of {memory.total / GIB:.1f} GiB free"
    return Check(
        "memory", found, enough, needed=False, advice="" if enough else "use a smaller batch and fewer workers."
    )


def _disk(folder: Path) -> Check:
    free = shutil.disk_usage(folder).free / GIB
    enough = free > 2
    return Check("disk", f"{free:.0f} GiB free here", enough, advice="" if enough else "at least 2 GiB are needed.")


def _package(name: str) -> Check:
    try:
        return Check(name, importlib.metadata.version(name))
    except importlib.metadata.PackageNotFoundError:
        pass
    if name == "nvidia-dali-cuda120":  # the build for CUDA 13 serves as well
        try:
            return Check("nvidia-dali-cuda130", importlib.metadata.version("nvidia-dali-cuda130"))
        except importlib.metadata.PackageNotFoundError:
            pass
    return Check(name, "not installed", False, advice="run: make install")


def _gpus() -> Check:
    reader = GpuReader()
    try:
        if not reader.count:
            return Check("GPUs", reader.problem, False, needed=False)
        names = [
            f"{g['name']} ({(g['memory_mb'] or 0) / 1024:.0f} GiB{', MIG' if g['mig'] else ''})"
            for g in reader.describe()
        ]
        return Check("GPUs", f"{', '.join(names)}; driver {reader.driver()}", needed=False)
    finally:
        reader.close()


def _guarded(name: str, look: Callable[[], Check]) -> Check:
    try:
        return look()
    except Exception as error:  # noqa: BLE001 - whatever is broken here is what the doctor must tell
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        return Check(name, f"does not work: {first}", False, advice="run: make install")


def _torch() -> Check:
    import torch

    importlib.import_module("torchvision")
    cuda = f"CUDA {torch.version.cuda}" if torch.version.cuda else "no CUDA build"
    there = "a GPU answers" if torch.cuda.is_available() else "no GPU answers"
    return Check("torch", f"{torch.__version__}, {cuda}, {there}")


def _dali() -> Check:
    from nvidia.dali import fn, types
    from nvidia.dali.pipeline import pipeline_def

    @pipeline_def(batch_size=1, num_threads=1, device_id=None)  # pyright: ignore[reportArgumentType] - None is the CPU
    def one() -> Any:
        values = fn.external_source(source=lambda: [np.arange(6, dtype=np.uint16)], batch=True)
        return fn.cast(values, dtype=types.DALIDataType.FLOAT)

    pipeline = one()
    pipeline.build()
    right = np.array_equal(np.asarray(pipeline.run()[0].at(0)), np.arange(6, dtype=np.float32))
    return Check("DALI pipeline", "runs on the CPU" if right else "gives wrong values", right)


def _decoders() -> list[Check]:
    """Decode a small picture of every encoding that the synthetic machines write."""
    from pydicom.uid import UID

    from preprocessing.synth_dicom import MACHINES

    machines = {machine.transfer_syntax: machine for machine in MACHINES if not machine.signed}
    return [_guarded(f"decode {UID(uid).name}", lambda m=machine: _decoder(m)) for uid, machine in machines.items()]


def _decoder(machine: Any) -> Check:
    from pydicom.uid import UID

    from preprocessing.decode import decode
    from preprocessing.settings import ConvertSettings
    from preprocessing.synth_dicom import Exposure, write

    name = f"decode {UID(machine.transfer_syntax).name}"
    ramp = 8 * np.add.outer(np.arange(64), np.arange(48)).astype(np.uint16)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "sample.dcm"
        path.write_bytes(
            write(ramp, machine, Exposure("1", "1", "L", "CC", age=50, implant=False, spacing=0.1, seed=0))
        )
        decoded = decode(path, ConvertSettings())
    right = np.array_equal(decoded.stored, ramp)
    return Check(name, decoded.decoder if right else f"{decoded.decoder} gives wrong values", right)


def _codec() -> Check:
    from preprocessing.gpu_decode import gpu_answers
    from preprocessing.settings import GPU_CODEC, ConvertSettings

    if gpu_answers():
        return Check(
            "codec for stores", f"{GPU_CODEC} to train on the GPU: {command_line(f'convert --codec {GPU_CODEC}')}"
        )
    return Check("codec for stores", f"{ConvertSettings().codec}, the default")


def _device() -> Check:
    from training.device import pick_device

    device = pick_device("auto")
    return Check("device used", str(device) if device.type == "cuda" else "cpu (training will be slow)")
