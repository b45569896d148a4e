"""What a person sees while a command runs, and the log: rich on a terminal, plain lines elsewhere, JSON on request."""

from __future__ import annotations

import json
import logging
import logging.handlers
import math
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
from rich.text import Text

from preprocessing.progress import Progress as State

PACKAGES = ("preprocessing", "dali_pipes", "training")
PLAIN_EVERY_S = 10.0  # between two plain progress lines, where there is no terminal
LIVE_EVERY_S = 1.0  # between two looks at the figures under a bar: reading a loss makes a GPU's queue run dry
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
            handlers.append(_LogFile(directory / "run.log", self._formatter()))
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

    def print(self, text: str, fields: Mapping[str, Any] | None = None) -> None:
        """One line on the screen, and in the log; `fields` go into JSON logs beside the text."""
        logging.getLogger("training").info(text, extra={"fields": dict(fields or {})})

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
    def progress(
        self, label: str, unit: str = "files", figures: Callable[[], str] | None = None
    ) -> Iterator[Callable[[State], None]]:
        """A progress bar; call what it gives with each new state.

        Args:
            label: what is being done.
            unit: of the things that are counted.
            figures: more to show beside the rate; asked only when it is shown, at most once a second.
        """
        if self.quiet:
            yield lambda state: None
        elif self.live:
            with _Bar(self._screen) as bar:
                yield self._live(bar, label, unit, figures)
        else:
            yield self._plain(label, unit, figures)

    def _live(self, bar: _Bar, label: str, unit: str, figures: Callable[[], str] | None) -> Callable[[State], None]:
        task, pace, shown = bar.add_task(label, total=None, unit=unit), _Pace(), -math.inf

        def advance(state: State) -> None:
            nonlocal shown
            now = time.monotonic()
            pace.note(state, now)
            if state.done >= state.total or now - shown >= LIVE_EVERY_S:
                shown = now
                bar.figures = _joined(pace.text(state, unit), figures() if figures else "")
            bar.update(task, total=state.total, completed=state.done)

        return advance

    def _plain(self, label: str, unit: str, figures: Callable[[], str] | None) -> Callable[[State], None]:
        pace, shown = _Pace(), time.monotonic()

        def advance(state: State) -> None:
            nonlocal shown
            now = time.monotonic()
            pace.note(state, now)
            if state.done >= state.total or now - shown >= PLAIN_EVERY_S:
                shown = now
                told = _joined(pace.text(state, unit), pace.left(state), figures() if figures else "")
                fields = {"label": label, "done": state.done, "total": state.total, "unit": unit}
                self.print(f"{label}: {_joined(f'{state.done} of {state.total} {unit}', told)}", fields)

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
            handler.setFormatter(self._formatter())
        handler.setLevel(logging.WARNING if self.quiet else logging.INFO)
        return handler

    def _formatter(self) -> logging.Formatter:
        if self._json:
            return _JsonFormatter(self.run_id)
        return logging.Formatter(f"%(asctime)s {self.run_id} %(levelname).1s %(message)s")


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
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line)


class _LogFile(logging.handlers.RotatingFileHandler):
    """A rotating log whose folder is made with the first line, so that a command that fails at once leaves nothing.

    Where it cannot be written it ends, and says so on standard error; the command goes on.
    """

    def __init__(self, path: Path, formatter: logging.Formatter) -> None:
        super().__init__(path, maxBytes=LOG_BYTES, backupCount=LOG_FILES, delay=True, encoding="utf-8")
        self.setFormatter(formatter)
        self._ended = False

    def emit(self, record: logging.LogRecord) -> None:
        if not self._ended:
            super().emit(record)

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802  logging's name
        error = sys.exc_info()[1]
        if not isinstance(error, OSError):
            super().handleError(record)
            return
        self._ended = True
        sys.stderr.write(f"{self.baseFilename}: no more is logged here: {error.strerror}.\n")

    def _open(self) -> Any:
        Path(self.baseFilename).parent.mkdir(parents=True, exist_ok=True)
        return super()._open()


class _Bar(Progress):
    """A bar with its figures on a line of their own, which wraps where the terminal is narrow."""

    def __init__(self, screen: RichConsole) -> None:
        self.figures = ""
        super().__init__(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(bar_width=32),
            MofNCompleteColumn(),
            TextColumn("{task.fields[unit]}", style="dim"),
            TextColumn("ETA", style="dim"),
            TimeRemainingColumn(),
            console=screen,
            transient=True,  # what it came to is said in a line of its own
        )

    def get_renderables(self) -> Iterator[Any]:
        yield from super().get_renderables()
        if self.figures:
            yield Text(f"  {self.figures}", style="dim")


class _Pace:
    """How fast a job goes, from its first state on: what a continued run did before is not this one's."""

    def __init__(self) -> None:
        self._first: State | None = None
        self._start = self._now = 0.0

    def note(self, state: State, now: float) -> None:
        """Take note of a state at `now`, in seconds."""
        self._now = now
        if self._first is None:
            self._first, self._start = state, now

    def text(self, state: State, unit: str) -> str:
        """Rates, and how many were rejected."""
        rate, parts = self._rate(state.done, "done"), []
        if rate:
            parts.append(f"{rate:.1f} {unit}/s")
        if state.bytes and (traffic := self._rate(state.bytes, "bytes")):
            parts.append(f"{traffic / 1e6:.1f} MB/s")
        if state.rejected:
            parts.append(f"{state.rejected} rejected")
        return ", ".join(parts)

    def left(self, state: State) -> str:
        """The time that the rest will take, at the same rate."""
        rate = self._rate(state.done, "done")
        return f"{clock((state.total - state.done) / rate)} left" if rate and state.done < state.total else ""

    def _rate(self, count: float, name: str) -> float:
        seconds = self._now - self._start
        return (count - getattr(self._first, name)) / seconds if seconds > 0.1 else 0.0  # of less, a rate says nothing


def clock(seconds: float) -> str:
    """A duration as 0:09, 12:30 or 3:05:00."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def _joined(*parts: str) -> str:
    return ", ".join(part for part in parts if part)


def _shown(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
