"""JPEG 2000, HTJ2K and lossless JPEG codestreams decoded on a GPU by nvImageCodec, where a conversion asks for it.

One process a machine owns the GPU; the worker processes lay codestreams into memory that each shares with it, and find
values there. They hold no CUDA context of their own (GPU memory for each, and 170 GiB of addresses; and contexts take
turns on a GPU where the streams of one share it), and a fault on the GPU costs that process alone. It decodes together
what has come in meanwhile: lossless JPEG four times as fast as one at a time, on an H100. What goes over the sockets is
a few bytes a picture: whole pictures, 24 MB each, had the process's threads wait for one interpreter.

Only what must come out bit-equal to the host's decoders is offered: reversible JPEG 2000, and lossless JPEG with the
predictor of Selection Value 1, of more than 8 bits (nvJPEG refuses those of 8). A GPU decoder's answer is not trusted
for being one: nvJPEG has given zeros for lossless JPEG of 9 to 15 bits without an error (nvImageCodec issue 50).
Whatever it refuses, and whatever looks blank, half done or out of range, the host decodes again; so does everything
once the GPU no longer answers.
"""

from __future__ import annotations

import ctypes
import logging
import mmap
import multiprocessing
import os
import queue
import secrets
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from multiprocessing.connection import Client, Connection, Listener
from multiprocessing.context import ForkServerContext
from multiprocessing.reduction import recv_handle, send_handle
from pathlib import Path
from struct import pack, unpack
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from preprocessing.codestream import Codestream, Kind
from preprocessing.guard import filler_rows

Values = NDArray[np.integer]
Decoder = Callable[[Sequence[bytes]], Sequence[Values | None]]

NAME = "nvimgcodec"  # in the manifest's column `decoder`
WAVELETS = frozenset({Kind.JPEG_2000, Kind.HTJ2K})
THREADS = 4  # of a decoder: codestreams on the GPU at once
_DECODERS = 2  # one's host work beside the other's
_BATCH = 8  # codestreams a decoder takes at a time, at most
_OPEN_S = 120.0  # the first use of a GPU may take half a minute
_ANSWER_S = 30.0  # after which the GPU is taken for lost
_ALIGNED = 64
_REQUEST = "<Q"  # bytes of the codestream, which begins the shared memory
_REPLY = "<QIIB"  # where in it the values begin; rows, columns, bytes a value
log = logging.getLogger(__name__)


class NoGpuError(Exception):
    """nvImageCodec cannot use a GPU here; says why."""


class Address(NamedTuple):
    """Where the process that owns the GPU listens."""

    path: str
    key: bytes


def suits(facts: Codestream, lossless_jpeg: bool) -> bool:
    """Whether a codestream is of a kind that a GPU decodes to the very values that went in."""
    kind = facts.kind in WAVELETS or (lossless_jpeg and facts.kind == Kind.JPEG_LOSSLESS and facts.precision > 8)
    return kind and facts.reversible and not facts.signed


def decode(data: bytes, facts: Codestream) -> Values | None:
    """The values of a codestream, [rows, columns], uint8 up to 8 bits and uint16 above, from the GPU that `connect`
    found.

    None where they cannot be had from one, or cannot be trusted: refused, of another size, blank, half of it filler,
    or above the codestream's precision.
    """
    if _connected.decoder is None:
        return None
    try:
        (values,) = _connected.decoder([data])
    except (OSError, EOFError):  # its process has died, or does not answer
        _connected.decoder = None
        return None
    return values if values is not None and _plausible(values, facts) else None


def connect(address: Address | None) -> None:
    """Have this process's `decode` ask the process at an address; without one, or where none answers, nobody."""
    _connected.decoder = None
    if address is not None:
        with suppress(OSError, EOFError, multiprocessing.AuthenticationError):
            _connected.decoder = _remote(Client(address.path, "AF_UNIX", authkey=address.key))


@contextmanager
def serving(context: ForkServerContext) -> Iterator[Address | None]:
    """A process that decodes on this machine's GPU for as long as the block lasts; None, and one warning, where no GPU
    can be used."""
    with tempfile.TemporaryDirectory(prefix="mammopipe-gpu-") as folder:
        address = Address(str(Path(folder) / "socket"), secrets.token_bytes(16))
        here, there = context.Pipe()
        process = context.Process(target=_own_gpu, args=(address, there), daemon=True, name="gpu-decoder")
        process.start()
        there.close()
        try:
            problem = here.recv() if here.poll(_OPEN_S) else f"the GPU did not open within {_OPEN_S:g} s"
        except EOFError:
            problem = "the process that should open the GPU died"
        if problem:
            log.warning("Decoding on the CPU: %s.", problem)
        try:
            yield None if problem else address
            if not problem and not process.is_alive():
                log.warning("The GPU's decoding process died; what came after was decoded on the CPU.")
        finally:
            process.terminate()
            process.join()


def open_decoder(threads: int = THREADS) -> Decoder:
    """A function from codestreams to their values, None for those that nvImageCodec refuses.

    Args:
        threads: of nvImageCodec, each of which may have a codestream of a batch on the GPU.

    Raises:
        NoGpuError: no GPU answers, or nvImageCodec is not installed.
    """
    run = _open_images(threads)
    return lambda frames: [None if image is None else _values(image) for image in run(frames)]


def _open_images(threads: int = THREADS) -> Callable[[Sequence[bytes]], Sequence[Any]]:
    """As `open_decoder`, the pictures still on the GPU."""
    nvimgcodec = _load()
    kinds = nvimgcodec.BackendKind
    try:
        opened = nvimgcodec.Decoder(
            device_id=0,
            max_num_cpu_threads=threads,
            backends=[nvimgcodec.Backend(kind) for kind in (kinds.GPU_ONLY, kinds.HYBRID_CPU_GPU)],
        )
    except RuntimeError as error:
        raise NoGpuError(f"nvImageCodec opens no GPU: {error}") from None
    params = nvimgcodec.DecodeParams(
        apply_exif_orientation=False, allow_any_depth=True, color_spec=nvimgcodec.ColorSpec.UNCHANGED
    )
    return lambda frames: opened.decode([nvimgcodec.CodeStream(frame) for frame in frames], params=params)


def _values(image: Any) -> Values:
    return np.asarray(image.cpu())[..., 0]


def gpu_answers() -> bool:
    """Whether this machine has a GPU that CUDA can use. Asked of the driver and not of nvImageCodec, which prints a
    line for each picture that it finds no GPU for."""
    try:
        driver, count = ctypes.CDLL("libcuda.so.1"), ctypes.c_int(0)
    except OSError:
        return False
    return driver.cuInit(0) == 0 and driver.cuDeviceGetCount(ctypes.byref(count)) == 0 and count.value > 0


class _Connected:
    decoder: Decoder | None = None


_connected = _Connected()


class _Shared:
    """Memory that two processes see through one file descriptor. It grows as either needs; in no folder, so that no
    container's small /dev/shm limits it."""

    def __init__(self, handle: int) -> None:
        self.handle = handle
        self._seen: mmap.mmap | None = None

    def upto(self, size: int) -> mmap.mmap:
        """At least so many bytes of it."""
        if self._seen is None or len(self._seen) < size:
            if os.fstat(self.handle).st_size < size:
                os.ftruncate(self.handle, size)
            self._seen = mmap.mmap(self.handle, size)
        return self._seen

    def array(self, at: int, rows: int, columns: int, width: int) -> Values:
        """A part of it as [rows, columns] of so many bytes a value."""
        count = rows * columns
        return np.frombuffer(self.upto(at + count * width), f"u{width}", count, at).reshape(rows, columns)

    def close(self) -> None:
        """Let go of it; arrays of it stay readable."""
        self._seen = None
        os.close(self.handle)


def _remote(connection: Connection) -> Decoder:
    shared = _Shared(os.memfd_create("codestream"))
    send_handle(connection, shared.handle, None)  # the process's number is of no use on Linux

    def run(frames: Sequence[bytes]) -> list[Values | None]:
        found: list[Values | None] = []
        for frame in frames:
            shared.upto(len(frame))[: len(frame)] = frame
            connection.send_bytes(pack(_REQUEST, len(frame)))
            if not connection.poll(_ANSWER_S):
                connection.close()
                raise EOFError
            reply = connection.recv_bytes()
            # A copy, for the next codestream comes into the same memory.
            found.append(shared.array(*unpack(_REPLY, reply)).copy() if reply else None)
        return found

    return run


class _Request(NamedTuple):
    """A codestream, and where its picture is waited for."""

    frame: bytes
    reply: queue.SimpleQueue[Any]


def _own_gpu(address: Address, ready: Connection) -> None:
    """What the process that owns the GPU runs. It ends when it is told to, and with the one that started it, however
    that ended: a GPU must not stay taken."""
    threading.Thread(target=_end_with, args=(ready,), daemon=True).start()
    _serve(address, ready)


def _end_with(starter: Connection) -> None:
    with suppress(OSError, EOFError):
        starter.recv_bytes()  # nothing is ever sent: the pipe closes
    os._exit(0)


def _serve(address: Address, ready: Connection) -> None:
    """Decode for whoever connects."""
    requests: queue.SimpleQueue[_Request] = queue.SimpleQueue()
    try:
        decoders = [_open_images() for _ in range(_DECODERS)]
        listener = Listener(address.path, "AF_UNIX", backlog=256, authkey=address.key)
    except (NoGpuError, OSError) as error:
        ready.send(str(error))
        return
    for decoder in decoders:
        threading.Thread(target=_decode_waiting, args=(decoder, requests), daemon=True).start()
    ready.send("")
    while True:
        with suppress(OSError, EOFError, multiprocessing.AuthenticationError):  # of one client, which then has none
            threading.Thread(target=_answer, args=(listener.accept(), requests), daemon=True).start()


def _decode_waiting(decoder: Callable[[Sequence[bytes]], Sequence[Any]], requests: queue.SimpleQueue[_Request]) -> None:
    """Decode what has come in, batch after batch."""
    while True:
        batch = [requests.get()]
        with suppress(queue.Empty):
            while len(batch) < _BATCH:
                batch.append(requests.get_nowait())
        try:
            images = decoder([request.frame for request in batch])
        except Exception:  # noqa: BLE001  out of memory, say: the host decodes these
            images = [None] * len(batch)
        for request, image in zip(batch, images, strict=True):
            request.reply.put(image)


def _answer(connection: Connection, requests: queue.SimpleQueue[_Request]) -> None:
    """Pass one worker's codestreams on, and the values back, until it goes."""
    reply: queue.SimpleQueue[Any] = queue.SimpleQueue()
    with suppress(OSError, EOFError), connection, closing(_Shared(recv_handle(connection))) as shared:
        while True:
            (length,) = unpack(_REQUEST, connection.recv_bytes())
            requests.put(_Request(shared.upto(length)[:length], reply))
            try:
                image = reply.get()
                values = None if image is None else _values(image)
            except RuntimeError:  # of CUDA
                values = None
            if values is None:
                connection.send_bytes(b"")
            else:
                (rows, columns), width, at = values.shape, values.dtype.itemsize, -(-length // _ALIGNED) * _ALIGNED
                shared.array(at, rows, columns, width)[:] = values
                connection.send_bytes(pack(_REPLY, at, rows, columns, width))


def _load() -> Any:
    try:
        from nvidia import nvimgcodec
    except ImportError as error:
        raise NoGpuError(f"nvImageCodec, which comes with DALI, cannot be imported ({error})") from None
    if not gpu_answers():
        raise NoGpuError("no NVIDIA GPU answers")
    return nvimgcodec


def _plausible(values: Values, facts: Codestream) -> bool:
    wanted = np.uint8 if facts.precision <= 8 else np.uint16
    if values.shape != (facts.rows, facts.columns) or values.dtype != wanted:
        return False
    least, most = int(values.min()), int(values.max())
    return least < most < 2**facts.precision and not filler_rows(values)
