"""What a person sees while a command runs, and the log: rich on a terminal, plain lines elsewhere, JSON on request."""

from __future__ import annotations

import json
import logging
import logging.handlers
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console as RichConsole
from rich.logging import RichHandler
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn
from rich.table import Table

from preprocessing.progress import Progress as State

PACKAGES = ("preprocessing", "dali_pipes", "training")
PLAIN_EVERY_S = 10.0  # between two plain progress lines, where there is no terminal
LOG_BYTES, LOG_FILES = 5_000_000, 3


class Console:
    """The screen and the log of one command. Use as a context manager.

    Progress and log lines go to standard error; tables to standard output, with the command's outcome.
    """

    def __init__(self, directory: Path | None = None, quiet: bool = False, json_logs: bool = False) -> None:
        """
        Args:
            directory: folder whose `run.log` takes the log too; it is made with the first line.
            quiet: show neither progress nor log lines below WARNING.
            json_logs: log to the screen and to the file as JSON, one object a line.
        """
        self.quiet, self._json = quiet, json_logs
        self.run_id = uuid.uuid4().hex[:8]
        self._screen = RichConsole(stderr=True, highlight=False)
        self.live = self._screen.is_terminal and not quiet and not json_logs
        handlers: list[logging.Handler] = [self._screen_handler()]
        if directory is not None:
            handlers.append(_LogFile(directory / "run.log", self._formatter(plain=True)))
        self._handlers = handlers
        self._loggers = [logging.getLogger(name) for name in PACKAGES]

    def __enter__(self) -> Console:
        for logger in self._loggers:
            logger.setLevel(logging.INFO)
            for handler in self._handlers:
                logger.addHandler(handler)
        return self

    def __exit__(self, *error: object) -> None:
        for handler in self._handlers:
            for logger in self._loggers:
                logger.removeHandler(handler)
            handler.close()

    def print(self, text: str) -> None:
        """One line on the screen, and in the log."""
        logging.getLogger("training").info(text)

    def heading(self, text: str) -> None:
        """The name of the step that begins."""
        if self.live:
            self._screen.rule(f"[bold]{text}", align="left", style="dim")
        else:
            self.print(f"== {text}")

    def table(self, title: str, rows: Sequence[Mapping[str, Any]]) -> None:
        """Rows of equal keys as a table on standard output."""
        out = RichConsole(file=sys.stdout, highlight=False)
        shown = Table(title=title, title_justify="left", title_style="bold", header_style="dim")
        for name in rows[0] if rows else ():
            numeric = all(isinstance(row[name], (int, float)) for row in rows)
            shown.add_column(str(name), justify="right" if numeric else "left", overflow="fold")
        for row in rows:
            shown.add_row(*(_shown(value) for value in row.values()))
        out.print(shown)

    @contextmanager
    def progress(self, label: str, unit: str = "files") -> Iterator[Callable[[State], None]]:
        """A progress bar; call what it gives with each new state."""
        if self.quiet:
            yield lambda state: None
        elif self.live:
            with self._bar() as bar:
                task = bar.add_task(label, total=None, unit=unit, extra="")
                start = time.monotonic()
                yield lambda state: bar.update(
                    task,
                    total=state.total,
                    completed=state.done,
                    extra=_rates(state, unit, time.monotonic() - start),
                )
        else:
            yield self._plain(label, unit)

    def _bar(self) -> Progress:
        return Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(bar_width=32),
            MofNCompleteColumn(),
            TextColumn("{task.fields[unit]}  {task.fields[extra]}", style="dim"),
            TimeRemainingColumn(),
            console=self._screen,
        )

    def _plain(self, label: str, unit: str) -> Callable[[State], None]:
        start = shown = time.monotonic()

        def advance(state: State) -> None:
            nonlocal shown
            now = time.monotonic()
            if state.done == state.total or now - shown >= PLAIN_EVERY_S:
                shown = now
                self.print(f"{label}: {state.done} of {state.total} {unit}, {_rates(state, unit, now - start)}")

        return advance

    def _screen_handler(self) -> logging.Handler:
        if self.live:
            handler: logging.Handler = RichHandler(
                console=self._screen,
                show_path=False,
                show_level=False,
                omit_repeated_times=False,
                log_time_format="%H:%M:%S",
            )
        else:
            handler = logging.StreamHandler(sys.stderr)
            handler.setFormatter(self._formatter(plain=True))
        handler.setLevel(logging.WARNING if self.quiet else logging.INFO)
        return handler

    def _formatter(self, plain: bool) -> logging.Formatter:
        if self._json:
            return _JsonFormatter(self.run_id)
        return logging.Formatter(f"%(asctime)s {self.run_id} %(levelname).1s %(message)s" if plain else "%(message)s")


class _JsonFormatter(logging.Formatter):
    def __init__(self, run_id: str) -> None:
        super().__init__()
        self._run_id = run_id

    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": round(record.created, 3),
            "run": self._run_id,
            "level": record.levelname,
            "module": record.name,
            "message": record.getMessage(),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line)


class _LogFile(logging.handlers.RotatingFileHandler):
    """A rotating log whose folder is made with the first line, so that a command that fails at once leaves nothing."""

    def __init__(self, path: Path, formatter: logging.Formatter) -> None:
        super().__init__(path, maxBytes=LOG_BYTES, backupCount=LOG_FILES, delay=True, encoding="utf-8")
        self.setFormatter(formatter)

    def _open(self) -> Any:
        Path(self.baseFilename).parent.mkdir(parents=True, exist_ok=True)
        return super()._open()


def _rates(state: State, unit: str, seconds: float) -> str:
    rate = state.done / max(seconds, 1e-6)
    parts = [f"{rate:.1f} {unit}/s"]
    if state.bytes:
        parts.append(f"{state.bytes / 1e6 / max(seconds, 1e-6):.1f} MB/s")
    if state.rejected:
        parts.append(f"{state.rejected} rejected")
    return ", ".join(parts)


def _shown(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
