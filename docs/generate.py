"""Writes the reference pages that follow from the code: `python docs/generate.py`. A test holds them up to date."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from pydantic import BaseModel

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from preprocessing.manifest import COLUMNS, LEVEL_COLUMNS, REJECTED_COLUMNS  # noqa: E402 (the path comes first)
from preprocessing.settings import ConvertSettings  # noqa: E402
from training.config import CFG, Config, presets  # noqa: E402


def configuration() -> str:
    """`docs/configuration.md`: every setting with its default and meaning."""
    lines = [
        "# Configuration reference",
        "Made from the code by `python docs/generate.py`.",
        "Set a value with `--set data.folds=4`, or in a YAML file given to `--config`.",
        "",
        f"Presets that ship with the package: {', '.join(f'`{name}`' for name in presets())}.",
    ]
    for path, model, value in _sections("", Config, CFG):
        lines += [
            "",
            f"## {path or 'the tree'}",
            *_summary(model),
            "",
            "| setting | default | what it is |",
            "|---|---|---|",
        ]
        for name, field in model.model_fields.items():
            if not isinstance(getattr(value, name), BaseModel):
                full = f"{path}.{name}" if path else name
                lines.append(f"| `{full}` | `{_shown(getattr(value, name))}` | {field.description} |")
    lines += [
        "",
        "## convert",
        *_summary(ConvertSettings),
        "Set a value with `convert --set NAME=VALUE`, or by its option.",
    ]
    lines += ["", "| setting | default | what it is |", "|---|---|---|"]
    for name, field in ConvertSettings.model_fields.items():
        lines.append(f"| `{name}` | `{_shown(field.default)}` | {field.description} |")
    return "\n".join(lines) + "\n"


def store() -> str:
    """`docs/store.md`: the files of a store and the columns of its manifest."""
    lines = [
        "# The store",
        "Made from the code by `python docs/generate.py`.",
        "",
        "| file | what |",
        "|---|---|",
        "| `store.json` | version and settings of the conversion |",
        "| `manifest.parquet` | one row an image, the columns below and the CSV's other columns as they were |",
        f"| `rejected.csv` | one row an unconverted input: {', '.join(f'`{c}`' for c in REJECTED_COLUMNS)} |",
        "| `folds.csv` | `image_id`, `fold`: written by `folds` |",
        "| `tiles/<level>/<patient>/<image>.tif` | 16-bit grayscale TIFF in tiles, for readers that know its codec; "
        "with `--codec htj2k` `<image>.j2k`, a bare HTJ2K codestream |",
        "",
        "Level L has longest side min(L, longest side of the crop); levels of equal size share one file.",
        "Values are stored values, unsigned,",
        "turned so that bright is dense, pixel padding 0; nothing is windowed, so the window stays a choice at load.",
        "",
        "## Columns of the manifest",
        "| column | type | what |",
        "|---|---|---|",
        *(f"| `{name}` | {dtype} | {meaning} |" for name, (dtype, meaning) in COLUMNS.items()),
        *(
            f"| `{name}_<level>` | {dtype} | {meaning}, for each level |"
            for name, (dtype, meaning) in LEVEL_COLUMNS.items()
        ),
    ]
    return "\n".join(lines) + "\n"


PAGES = {"configuration.md": configuration, "store.md": store}


def _sections(path: str, model: type[BaseModel], value: Any) -> list[tuple[str, type[BaseModel], Any]]:
    found = [(path, model, value)]
    for name in model.model_fields:
        child = getattr(value, name)
        if isinstance(child, BaseModel):
            found += _sections(f"{path}.{name}" if path else name, type(child), child)
    return found


def _summary(model: type[BaseModel]) -> list[str]:
    return [" ".join((model.__doc__ or "").split())]


def _shown(value: Any) -> str:
    if value is None:
        return "null"
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)


if __name__ == "__main__":
    for name, page in PAGES.items():
        (ROOT / "docs" / name).write_text(page(), encoding="utf-8")
