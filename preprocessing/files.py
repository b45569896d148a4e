"""Files that are there whole or not at all, folders that one process writes, and scratch ones."""

from __future__ import annotations

import fcntl
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from preprocessing.errors import InputError, UserError

log = logging.getLogger(__name__)

LOCK = ".lock"
_YOUNG_S = 60.0  # of a folder that is not yet locked


def write_atomically(path: Path, data: bytes) -> None:
    """Write through a temporary file, fsync and rename: a reader sees the old bytes or the new ones, never a part."""
    with replaced(path) as file:
        file.write(data)


@contextmanager
def held(folder: Path, otherwise: UserError) -> Iterator[Path]:
    """Hold a folder for one process, by a lock on the file `LOCK` there, whose path it gives. The lock ends with the
    process, however that ends.

    Raises:
        UserError: `otherwise`, where another process holds it; one of its kind where the folder cannot be written.
    """
    path = folder / LOCK
    try:
        file = path.open("ab")
    except FileNotFoundError:  # its last holder has just removed the folder
        raise otherwise from None
    except OSError as error:
        raise type(otherwise)(f"{folder}: cannot be written: {error.strerror}.") from None
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise otherwise from None
        except OSError as error:  # file systems that have no locks
            log.warning("%s cannot be locked (%s): see that nothing else writes there.", folder, error.strerror)
        if not os.fstat(file.fileno()).st_nlink:  # its last holder has just removed it
            raise otherwise
        yield path


@contextmanager
def claimed(folder: Path, otherwise: UserError) -> Iterator[None]:
    """Hold a folder, made if need be; one that nothing came into is gone at the end.

    Raises:
        UserError: as `held`.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise type(otherwise)(f"{folder}: cannot be made: {error.strerror}.") from None
    with held(folder, otherwise) as path:
        try:
            yield
        finally:
            with suppress(OSError):
                if list(folder.iterdir()) == [path]:
                    path.unlink()
                    folder.rmdir()


def abandoned(folder: Path) -> bool:
    """Whether the process that held a folder has ended; not where none did, where that cannot be told, or where the
    folder is so young that one may be about to."""
    try:
        if time.time() - folder.stat().st_mtime < _YOUNG_S:
            return False
        with (folder / LOCK).open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


@contextmanager
def scratch(prefix: str) -> Iterator[Path]:
    """A temporary folder of a name that begins so, gone at the end. First those go whose process was killed."""
    for lock in Path(tempfile.gettempdir()).glob(f"{prefix}*/{LOCK}"):
        if abandoned(lock.parent):
            shutil.rmtree(lock.parent, ignore_errors=True)
    with (
        tempfile.TemporaryDirectory(prefix=prefix) as folder,
        held(Path(folder), InputError(f"{folder}: another process writes there. Run the same command again.")) as lock,
    ):
        yield lock.parent


@contextmanager
def replaced(path: Path) -> Iterator[IO[bytes]]:
    """A binary file to write that takes `path`'s place, synced to the disk, when the block ends without an error."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException as error:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno is not None:
            error.filename, error.filename2 = str(path), None  # which a full disk does not name
        raise
