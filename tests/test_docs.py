"""The documentation is true: reference pages follow the code, and links lead somewhere."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from typing import Any

import pytest

import cli
from preprocessing.convert import convert
from preprocessing.manifest import open_store
from preprocessing.settings import ConvertSettings
from preprocessing.synth import synthesize
from training.config import DataSettings
from training.folds import make_folds

ROOT = Path(__file__).resolve().parents[1]
_spec = importlib.util.spec_from_file_location("generate", ROOT / "docs" / "generate.py")
assert _spec is not None
assert _spec.loader is not None
generate = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(generate)


@pytest.mark.parametrize("name", sorted(generate.PAGES))
def test_reference_pages_follow_the_code(name):
    page = (ROOT / "docs" / name).read_text(encoding="utf-8")
    assert page == generate.PAGES[name](), "out of date; run: python docs/generate.py"


@pytest.mark.parametrize(
    "page", sorted(p.relative_to(ROOT).as_posix() for p in [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])
)
def test_relative_links_lead_somewhere(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    targets = [t.split("#")[0] for t in re.findall(r"\]\(([^)\s]+)\)", text) if not t.startswith(("http", "#"))]
    assert [t for t in targets if not ((ROOT / page).parent / t).exists()] == []


def test_readme_names_every_command_and_only_those():
    named = set(re.findall(r"python cli\.py ([a-z-]+)", (ROOT / "README.md").read_text(encoding="utf-8")))
    assert named - set(cli.main.commands) == set()
    assert set(cli.main.commands) - named <= {"demo"}


def test_architecture_names_every_module():
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    modules = [p for package in ("preprocessing", "dali_pipes", "training") for p in (ROOT / package).glob("*.py")]
    assert [p.name for p in modules if p.name != "__init__.py" and p.name not in text] == []


def test_python_page_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    synthesize(Path("data/rsna"), patients=10)
    convert(
        Path("data/rsna/train_images"), Path("data/rsna/train.csv"), Path("store"), ConvertSettings(levels=("512",))
    )
    make_folds(open_store("store"), DataSettings())
    names: dict[str, Any] = {}
    for block in re.findall(
        r"```python\n(.*?)```", (ROOT / "docs" / "python.md").read_text(encoding="utf-8"), re.DOTALL
    ):
        exec(compile(block, "docs/python.md", "exec"), names)  # pages of ours
    assert len(names["predictions"]) == len(names["held_out"]) > 0
    assert Path("submission.csv").is_file()
