"""Decoding on a GPU: the same values as on the host, which takes over wherever the GPU fails. Where the GPU is
simulated, it says so."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace

import imagecodecs
import numpy as np
import psutil
import pytest
import torch
from pydicom import uid

from preprocessing import gpu_decode
from preprocessing.codecs import CODECS
from preprocessing.codestream import inspect
from preprocessing.convert import convert
from preprocessing.decode import decode
from preprocessing.guard import Reason, Rejection
from preprocessing.manifest import open_store
from preprocessing.settings import ConvertSettings
from tests.preprocessing.dicoms import LOSSLESS, dataset, encode, picture, save, write

ROOT = Path(__file__).resolve().parents[2]
HOST, GPU, ALL = (ConvertSettings(decode_on=place) for place in ("cpu", "gpu", "gpu-all"))
OFFERED = (
    uid.JPEGLosslessSV1,
    uid.JPEG2000Lossless,
    uid.JPEG2000,
    uid.HTJ2KLossless,
    uid.HTJ2KLosslessRPCL,
    uid.HTJ2K,
)


def right(frames):
    """A simulated GPU decoder without a fault."""
    found = []
    for frame in frames:
        facts = inspect(frame)
        values = CODECS[facts.kind].decode(frame, facts)
        found.append(values.view(values.dtype.str.replace("i", "u")))
    return found


def half(values):
    made = values.copy()
    made[len(made) // 2 :] = made[0, 0]
    return made


FAULTS = {
    "refuses": lambda values: None,
    "gives zeros": np.zeros_like,
    "gives another size": lambda values: values[:-1],
    "gives bytes": lambda values: values.astype(np.uint8),
    "gives values above the precision": lambda values: values * 16,
    "stops half-way": half,
}


@pytest.fixture
def simulated(monkeypatch):
    """Put a function in the GPU decoder's place; tells what it was asked for."""

    def put(function):
        asked = []

        def run(frames):
            asked.append(len(frames))
            return function(frames)

        monkeypatch.setattr(gpu_decode._connected, "decoder", run)
        return asked

    return put


@pytest.mark.parametrize("syntax", LOSSLESS)
def test_what_the_simulated_gpu_decodes_is_taken_where_it_must_be_bit_equal(tmp_path: Path, simulated, syntax) -> None:
    asked = simulated(right)
    values = picture(12, rows=200, columns=160)
    path = write(tmp_path / "a.dcm", values, syntax=syntax, bits=12)
    found, host = decode(path, ALL), decode(path, HOST)
    assert (found.decoder == gpu_decode.NAME) == bool(asked) == (syntax in OFFERED)
    asked.clear()
    assert decode(path, GPU).stored.tobytes() == found.stored.tobytes()
    assert bool(asked) == (syntax in OFFERED[1:])
    assert np.array_equal(found.stored, values)
    assert found.stored.dtype == host.stored.dtype
    assert repr(found.header) == repr(host.header)  # what is unknown is NaN, which is unequal to itself


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("syntax", [uid.JPEG2000Lossless, uid.JPEGLosslessSV1])
def test_the_host_takes_over_where_the_simulated_gpu(tmp_path: Path, simulated, syntax, fault) -> None:
    asked = simulated(lambda frames: [FAULTS[fault](values) for values in right(frames)])
    values = picture(12, rows=200, columns=160)
    found = decode(write(tmp_path / "a.dcm", values, syntax=syntax, bits=12), ALL)
    assert asked == [1]
    assert np.array_equal(found.stored, values)
    assert found.decoder != gpu_decode.NAME


def test_a_gpu_whose_process_died_is_not_asked_again(tmp_path: Path, simulated) -> None:
    def lost(frames):
        raise EOFError

    asked = simulated(lost)
    values = picture(12, rows=200, columns=160)
    for name in ("a.dcm", "b.dcm"):
        found = decode(write(tmp_path / name, values, syntax=uid.JPEG2000Lossless, bits=12), GPU)
        assert np.array_equal(found.stored, values)
    assert asked == [1]


@pytest.fixture
def served(tmp_path: Path, monkeypatch):
    """The owning process's own loop, in a thread, with a simulated GPU behind it."""

    def start(function):
        def images(frames):
            return [SimpleNamespace(cpu=lambda values=values: values[..., None]) for values in function(frames)]

        monkeypatch.setattr(gpu_decode, "_open_images", lambda: images)
        address = gpu_decode.Address(str(tmp_path / "socket"), b"key")
        here, there = get_context("spawn").Pipe()
        threading.Thread(target=gpu_decode._serve, args=(address, there), daemon=True).start()
        assert here.recv() == ""
        gpu_decode.connect(address)
        return address

    yield start
    gpu_decode.connect(None)


def test_pictures_of_any_size_go_through_the_memory_that_is_shared(tmp_path: Path, served) -> None:
    served(right)
    sizes = [(40, 30), (900, 700), (64, 64), (1, 5), (1200, 900), (900, 700)]
    given, found = [], []
    for rows, columns in sizes:
        given.append(picture(12 if rows > 1 else 8, rows=rows, columns=columns, seed=rows))
        frame = encode(given[-1], uid.JPEG2000Lossless, 12 if rows > 1 else 8)
        found += gpu_decode._connected.decoder([frame])
    assert all(map(np.array_equal, found, given)), "earlier ones stay as they are"


STARTER = """
import time
from multiprocessing import get_context
import psutil
from preprocessing import gpu_decode
context = get_context("forkserver")
context.set_forkserver_preload(["simulated_gpu"])
with gpu_decode.serving(context) as address:
    assert address is not None
    children = psutil.Process().children(recursive=True)
    (owner,) = [each for each in children if address.path in {at.laddr for at in each.net_connections("unix")}]
    print(owner.pid, flush=True)
    time.sleep(60)
"""


def test_the_process_that_owns_the_gpu_ends_with_the_one_that_started_it_however_that_ends(tmp_path: Path) -> None:
    simulated = "from preprocessing import gpu_decode\ngpu_decode._open_images = lambda: None\n"
    (tmp_path / "simulated_gpu.py").write_text(simulated)
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{tmp_path}"}
    command = [sys.executable, "-c", STARTER]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as starter:
        assert starter.stdout is not None
        owner = psutil.Process(int(starter.stdout.readline()))
        starter.kill()
    owner.wait(timeout=20)


def test_lossless_jpeg_of_8_bits_is_not_offered(tmp_path: Path, simulated) -> None:
    asked = simulated(right)
    values = picture(8, rows=200, columns=160)
    decode(write(tmp_path / "a.dcm", values, syntax=uid.JPEGLosslessSV1, bits=8), ALL)
    assert not asked


def test_values_come_over_the_socket_and_what_the_gpu_refuses_does_not(tmp_path: Path, served) -> None:
    def faulty(frames):
        if len(frames[0]) % 2:
            raise RuntimeError("out of memory")
        return right(frames)

    served(faulty)
    outcomes = set()
    for seed in range(12):
        values = picture(12, rows=200, columns=160, seed=seed)
        frame = encode(values, uid.JPEG2000Lossless, 12)
        found = gpu_decode.decode(frame, inspect(frame))
        assert found is None if len(frame) % 2 else np.array_equal(found, values)
        outcomes.add(found is None)
    assert outcomes == {True, False}


def test_a_wrong_key_or_address_leaves_the_host_to_decode(tmp_path: Path, served) -> None:
    address = served(right)
    frame = encode(picture(12, rows=200, columns=160), uid.JPEG2000Lossless, 12)
    for wrong in (address._replace(key=b"other"), address._replace(path=str(tmp_path / "none"))):
        gpu_decode.connect(wrong)
        assert gpu_decode.decode(frame, inspect(frame)) is None
    gpu_decode.connect(address)
    assert gpu_decode.decode(frame, inspect(frame)) is not None


def test_a_gpu_that_does_not_answer_is_given_up(tmp_path: Path, served, monkeypatch) -> None:
    monkeypatch.setattr(gpu_decode, "_ANSWER_S", 0.2)
    served(lambda frames: time.sleep(2))
    frame = encode(picture(12, rows=200, columns=160), uid.JPEG2000Lossless, 12)
    assert gpu_decode.decode(frame, inspect(frame)) is None
    assert gpu_decode._connected.decoder is None


def test_lossy_and_signed_codestreams_are_not_offered(tmp_path: Path, simulated) -> None:
    asked = simulated(right)
    values = picture(12, rows=200, columns=160)
    lossy = bytes(imagecodecs.jpeg2k_encode(values, level=60, reversible=False, codecformat="J2K", bitspersample=12))
    decode(save(tmp_path / "lossy.dcm", dataset(values, uid.JPEG2000, bits=12, frames=[lossy])), ALL)
    other = encode(values, uid.JPEGLossless, 12, predictor=6)
    decode(save(tmp_path / "other.dcm", dataset(values, uid.JPEGLossless, bits=12, frames=[other])), ALL)
    signed = picture(12, signed=True, rows=200, columns=160)
    assert np.array_equal(
        decode(write(tmp_path / "s.dcm", signed, syntax=uid.JPEG2000Lossless, bits=12), ALL).stored, signed
    )
    assert not asked


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_without_a_gpu_a_store_comes_out_the_same_and_may_be_completed_on_the_cpu(tmp_path: Path, caplog) -> None:
    images = tmp_path / "images"
    images.mkdir()
    for number, syntax in enumerate(OFFERED[:3]):
        write(images / f"{number}.dcm", picture(12, rows=200, columns=160, seed=number), syntax=syntax, bits=12)
    convert(images, None, tmp_path / "gpu", GPU.model_copy(update={"levels": ("full",)}), workers=1)
    convert(images, None, tmp_path / "cpu", HOST.model_copy(update={"levels": ("full",)}), workers=1)
    stores = [open_store(tmp_path / name) for name in ("gpu", "cpu")]
    assert stores[0].manifest.equals(stores[1].manifest)
    assert [record.getMessage() for record in caplog.records] == ["Decoding on the CPU: no NVIDIA GPU answers."]
    again = convert(images, None, tmp_path / "gpu", HOST.model_copy(update={"levels": ("full",)}), workers=1)
    assert (again.unchanged, again.converted) == (3, 0)


@pytest.fixture(scope="module")
def connected():
    """This process, with a GPU's beside it."""
    with gpu_decode.serving(get_context("forkserver")) as address:
        assert address is not None
        gpu_decode.connect(address)
        yield
        gpu_decode.connect(None)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no NVIDIA GPU here")
@pytest.mark.parametrize("bits", [8, 10, 12, 13, 14, 15, 16])
@pytest.mark.parametrize("syntax", OFFERED)
def test_the_gpu_gives_the_values_that_went_in(tmp_path: Path, connected, syntax, bits) -> None:
    for rows, columns in ((200, 160), (1025, 771)):
        values = picture(bits, rows=rows, columns=columns)
        path = write(tmp_path / f"{rows}.dcm", values, syntax=syntax, bits=bits)
        found = decode(path, ALL)
        assert np.array_equal(found.stored, values)
        assert (found.decoder == gpu_decode.NAME) == ((syntax, bits) != (uid.JPEGLosslessSV1, 8))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no NVIDIA GPU here")
@pytest.mark.parametrize("syntax", OFFERED[:4])
def test_damaged_files_come_out_as_on_the_host(tmp_path: Path, connected, syntax) -> None:
    values = picture(12, rows=200, columns=160)
    sound = encode(values, syntax, 12)
    rng = np.random.default_rng(0)
    for number in range(20):
        data = bytearray(sound)
        at = int(rng.integers(len(data) // 4, len(data)))
        data[at:] = data[at:][: int(rng.integers(0, 64))] if number % 2 else bytes(b ^ 0x55 for b in data[at:])
        path = save(tmp_path / f"{number}.dcm", dataset(values, syntax, bits=12, frames=[bytes(data)]))
        outcomes = []
        for settings in (HOST, ALL):
            try:
                outcomes.append(decode(path, settings).stored.tobytes())
            except Rejection as rejection:
                outcomes.append(Reason(rejection.reason))
        assert outcomes[0] == outcomes[1]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no NVIDIA GPU here")
def test_a_store_decoded_on_the_gpu_has_the_same_tiles(tmp_path: Path) -> None:
    images = tmp_path / "images"
    images.mkdir()
    for number in range(12):
        values = picture(12, rows=700, columns=520, seed=number)
        write(images / f"{number:02d}.dcm", values, syntax=OFFERED[number % len(OFFERED)], bits=12)
    for name, settings in (("gpu", ALL), ("cpu", HOST)):
        convert(images, None, tmp_path / name, settings, workers=2)
    gpu, cpu = (open_store(tmp_path / name).manifest for name in ("gpu", "cpu"))
    assert gpu["decoder"].tolist() == [gpu_decode.NAME] * 12
    assert gpu.drop(columns="decoder").equals(cpu.drop(columns="decoder"))
