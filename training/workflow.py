"""The whole job as `run` does it: convert, folds, train, evaluate, predict, report, each skipped where it is done.

Conversion knows by itself what is missing or changed. Every later step leaves a stamp in the run folder's
`workflow.json`: a hash of what went in. A step is skipped where its outputs are there and its stamp is unchanged.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from preprocessing import convert as conversion
from preprocessing.errors import InputError, RunError, command_line
from preprocessing.files import write_atomically
from preprocessing.manifest import Store, open_store
from preprocessing.settings import ConvertSettings
from training import config as configuration
from training import fit, folds, run_files, runs
from training.config import Config
from training.console import Console
from training.environment import facts_trained_on
from training.evaluation import evaluate as evaluation
from training.evaluation import report
from training.inference import predict
from training.monitor import watched

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Job:
    """Where everything of one job lies."""

    images: Path
    table: Path
    test_images: Path
    test_table: Path
    store: Path
    run: Path
    submission: Path
    report: Path
    config: Config


@dataclass(frozen=True)
class Outcome:
    """What a job came to: headline rows, where the files lie, how long each step took."""

    headline: Sequence[dict[str, str]]
    files: dict[str, Path]
    seconds: dict[str, float]
    skipped: Sequence[str]
    exit_code: int

    def __str__(self) -> str:
        took = ", ".join(f"{name} {seconds:.0f} s" for name, seconds in self.seconds.items())
        lines = [f"Done in {sum(self.seconds.values()):.0f} s ({took})."]
        if self.skipped:
            lines.append(f"Unchanged, not done again: {', '.join(self.skipped)}.")
        lines += ["  ".join(row.values()) for row in self.headline]
        width = max(len(name) for name in self.files)
        lines += [f"{name.ljust(width)}  {path}" for name, path in self.files.items()]
        return "\n".join(lines)


def run_all(job: Job, console: Console) -> Outcome:
    """Do the whole job, or what of it is not done yet.

    Raises:
        InputError, StoreError, RunError, ConfigError: as the steps do.
    """
    steps = Steps(job.run / "workflow.json", console)
    for path in (job.images, job.table):
        if not path.exists():
            raise InputError(f"{path}: not there. Make a synthetic data set with: {command_line('synth')}")
    if not job.test_table.exists():
        console.print(f"{job.test_table}: no such CSV file; nothing will be predicted.")
    elif not job.test_images.is_dir():
        raise InputError(f"{job.test_images}: no such folder of pictures to predict.")
    converted = steps.always("convert", lambda: _convert(job, console))
    store = open_store(job.store)
    data = _digest(store.fingerprint, job.config.data.model_dump_json())
    steps.once("folds", data, [job.store / folds.FOLDS_FILE], lambda: split(store, job.config, steps))
    numbers = sorted(int(fold) for fold in folds.read_folds(store)["fold"].unique())
    facts = facts_trained_on(store, job.config)
    split_into = _file_digest(job.store / folds.FOLDS_FILE)
    trained = _digest(data, configuration.dump(job.config), split_into, *map("=".join, facts.items()))
    for folder in job.run.glob("fold*"):
        if folder.name.removeprefix("fold").isdigit() and int(folder.name.removeprefix("fold")) not in numbers:
            _set_aside(folder, "belongs to other folds", console)
    for fold in numbers:
        folder = job.run / f"fold{fold}"
        made = [folder / runs.VALIDATION, folder / runs.BEST]
        steps.once(f"train fold {fold}", trained, made, lambda f=fold: _train(job, store, f, console))
    evaluation.take_facts(runs.open_run(job.run), store)
    evaluated = _digest(trained, *(_file_digest(job.run / f"fold{fold}" / "validation.csv") for fold in numbers))
    metrics = job.run / "metrics.json"
    judged = _digest(evaluated, str(evaluation.FORMAT))
    steps.once("evaluate", judged, [metrics], lambda: _evaluate(job, store), unchanged=True)
    exit_code, files = 0, {}
    if job.test_table.exists():
        where = (str(job.test_images.resolve()), str(job.submission.resolve()))
        wanted = _digest(evaluated, _file_digest(job.test_table), *where, *_listing(job.test_images))
        result = steps.once("predict", wanted, [job.submission], lambda: _predict(job, console), unchanged=True)
        if result:
            steps.remember("exit code of predict", result.exit_code)
        exit_code = steps.known("exit code of predict")
        if exit_code:  # some breast fell back, which may be mended by the next call
            steps.remember("predict", "")
        files["submission"] = job.submission
    steps.once(
        "report", _digest(judged, str(exit_code)), [job.report], lambda: report.write_report([job.run], job.report)
    )
    files |= {"report": job.report, "metrics": metrics, "store": job.store, "runs": job.run}
    headline = evaluation.headline(run_files.read_json(metrics, "Delete it, and it will be recreated."))
    return Outcome(
        headline=[{"": str(converted)}, *headline],
        files=files,
        seconds=steps.seconds,
        skipped=steps.skipped,
        exit_code=exit_code,
    )


def split(store: Store, config: Config, steps: Steps) -> None:
    """Make the store's folds, or make them anew where this run made those that are there; others' are used as they are,
    for their runs' models were held out by them.

    Raises:
        InputError: too few patients for so many folds.
        StoreError: folds there that others made and that cannot be used.
    """
    path = store.root / folds.FOLDS_FILE
    made = steps.known("folds made here")
    if made is None and steps.known("folds") is not None:  # by this run before it remembered them
        made = _file_digest(path) if path.is_file() else None
    if path.is_file() and _file_digest(path) != made:
        folds.read_or_make_folds(store, config.data)
        steps.remember("folds made here", "")
        return
    folds.make_folds(store, config.data)
    steps.remember("folds made here", _file_digest(path))


def _listing(folder: Path) -> Iterator[str]:
    """What tells whether files changed: each one's name, size and time."""
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            status = path.stat()
            yield f"{path.relative_to(folder)} {status.st_size} {status.st_mtime_ns}"


def _convert(job: Job, console: Console) -> conversion.ConvertSummary:
    # A store that is there keeps its own levels and codec, which `convert` was asked for.
    there = (job.store / "store.json").is_file()
    settings = open_store(job.store, finished=False).settings if there else ConvertSettings()
    with watched(console, "Converting", "files", "convert", job.store) as (_, advance):
        return conversion.convert(job.images, job.table, job.store, settings, progress=advance)


def _set_aside(folder: Path, why: str, console: Console) -> None:
    """Nothing is thrown away."""
    replaced = folder.with_name(f"{folder.name}.replaced-{time.strftime('%Y%m%d-%H%M%S')}")
    folder.rename(replaced)
    console.print(f"{folder} {why}; it is now {replaced.name}.")


def _train(job: Job, store: Store, fold: int, console: Console) -> fit.FitSummary:
    folder = job.run / f"fold{fold}"
    resume = runs.continues(folder, job.config, store)
    if folder.exists() and not resume:
        _set_aside(folder, "was made with another configuration, store or split", console)
    return fit.fit(job.config, store, fold, job.run, resume=resume, command=shlex.join(sys.argv), console=console)


def _evaluate(job: Job, store: Store) -> dict[str, Any]:
    # The job's own, for a run that was trained before may have been begun with others.
    return evaluation.evaluate(job.run, store, names=job.config.train.covariates)


def _predict(job: Job, console: Console) -> predict.PredictSummary:
    with watched(console, "Predicting", "images", "predict") as (monitor, advance):
        return predict.predict(
            [job.run],
            job.submission,
            store=None,
            images=job.test_images,
            csv=job.test_table,
            device=job.config.train.device,
            covariates=job.config.train.covariates,
            progress=advance,
            monitor=monitor,
        )


class Steps:
    """Runs steps, times them, and skips those whose stamp says that nothing has changed."""

    def __init__(self, stamps: Path, console: Console) -> None:
        self._path, self._console = stamps, console
        self._stamps: dict[str, Any] = {}
        if stamps.is_file():
            try:
                self._stamps = run_files.read_json(stamps, "What the steps were made from is not known any more.")
            except RunError as error:
                log.warning("%s", error)
        self.seconds: dict[str, float] = {}
        self.skipped: list[str] = []

    def always(self, name: str, action: Callable[[], Any]) -> Any:
        """The action's result."""
        self._console.heading(name)
        start = time.perf_counter()
        result = action()
        self.seconds[name] = time.perf_counter() - start
        return result

    def once(
        self, name: str, stamp: str, outputs: Sequence[Path], action: Callable[[], Any], unchanged: bool = False
    ) -> Any:
        """The action's result, or None where the step was skipped: with `unchanged`, where its outputs are what it had
        made."""
        made = f"outputs of {name}"
        there = self.known(name) == stamp and all(path.is_file() for path in outputs)
        if there and (not unchanged or self.known(made) == [_file_digest(path) for path in outputs]):
            self.skipped.append(name)
            return None
        result = self.always(name, action)
        self.remember(name, stamp)
        if unchanged:
            self.remember(made, [_file_digest(path) for path in outputs])
        return result

    def remember(self, name: str, value: Any) -> None:
        """Keep a value for later calls."""
        self._stamps[name] = value
        self._path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(self._path, json.dumps(self._stamps, indent=1).encode())

    def known(self, name: str) -> Any:
        """What was remembered, by this call or an earlier one; None for nothing."""
        return self._stamps.get(name)


def _digest(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def _file_digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
