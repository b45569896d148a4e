"""The report: whole, self-contained and honest for finished, unfinished, one-sided and many runs."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import roc_auc_score, roc_curve

from preprocessing.errors import RunError
from training import metrics, run_files, runs
from training.config import dump, load_config
from training.evaluation import evaluate, figures, intervals, report, report_pictures
from training.evaluation import report_sections as sections


def make_run(root: Path, folds: int = 2, positives: bool = True, finished: bool = True) -> Path:
    """A run folder with the files of the contract, as training writes them; figures drawn from a seed."""
    config = load_config(overrides=("model.backbone=test_efficientnet", "pipeline.height=64", "pipeline.width=48"))
    generator = np.random.default_rng(5)
    for number in range(folds):
        folder = root / f"fold{number}"
        folder.mkdir(parents=True)
        (folder / "config.yaml").write_text(dump(config), encoding="utf-8")
        run_files.write_json(folder / "environment.json", {"store": str(root / "gone"), "store_fingerprint": "0"})
        if not finished:
            continue
        with (folder / "metrics.jsonl").open("w", encoding="utf-8") as file:
            for epoch in range(3):
                figures = {"train_loss": 0.6 - epoch / 10, "val_loss": 0.65, "auroc": 0.6 + epoch / 10, "lr": 1e-4}
                file.write(
                    json.dumps({"kind": "epoch", "epoch": epoch, "step": epoch, "time": epoch, **figures}) + "\n"
                )
                sample = {"cpu_percent": 150.0, "rss_mb": 900.0, "gpu0": {"utilisation": 95, "memory_mb": 1e4}}
                file.write(json.dumps({"kind": "resources", "time": 60.0 * epoch, "step": epoch, **sample}) + "\n")
            file.write(json.dumps({"kind": "summary", "time": 200, "step": 3, "advice": "All is well."}) + "\n")
        ids = [f"{number}{index:03d}" for index in range(80)]
        cancer = generator.integers(0, 2, 80) if positives else np.zeros(80, int)
        table = pd.DataFrame(
            {
                "image_id": ids,
                "patient_id": [f"p{identifier}" for identifier in ids],
                "laterality": "L",
                "view": ["CC", "MLO"] * 40,
                "prediction_id": [f"p{identifier}_L" for identifier in ids],
                "cancer": cancer,
                "site_id": "1",
                "machine_id": generator.choice(["29", "49"], 80),
                "age": generator.integers(40, 80, 80),
                "density": generator.choice(["A", "B", ""], 80),
                "implant": 0,
                "fold": number,
                "prediction": np.clip(0.3 + 0.3 * cancer + generator.normal(0, 0.2, 80), 0, 1),
            }
        )
        run_files.write_table(folder / runs.VALIDATION, table)
        run_files.write_json(folder / runs.SUMMARY, {})
    return root


class Page(HTMLParser):
    """Counts what a browser would load, draw and read out."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.loads: list[str] = []
        self.unnamed: list[str] = []
        self.figures = 0
        self.text = path.read_text(encoding="utf-8")
        self.feed(self.text)

    def handle_starttag(self, tag, attrs):
        found = dict(attrs)
        self.loads += [
            v for k, v in attrs if k in ("src", "href", "xlink:href") and v and not v.startswith(("data:", "#"))
        ]
        if tag == "svg":
            self.figures += 1
            if not found.get("aria-label"):
                self.unnamed.append(tag)
        if tag == "img" and not found.get("alt"):
            self.unnamed.append(tag)


@pytest.fixture(scope="module")
def page(tmp_path_factory) -> Page:
    return Page(report.write_report([make_run(tmp_path_factory.mktemp("report") / "good")]))


def test_page_loads_nothing_from_elsewhere(page):
    assert page.loads == []
    assert "<script" not in page.text


def test_every_figure_and_picture_has_a_name(page):
    assert page.figures >= 10
    assert page.unnamed == []


def test_summary_says_what_was_judged(page):
    assert re.search(r"Judged on 160 breasts that its models had not seen, \d+ of them with cancer", page.text)
    assert "All is well." in page.text


def test_age_taken_into_account_is_said_with_what_the_pictures_alone_give(tmp_path):
    run = make_run(tmp_path / "run")
    plain = Page(report.write_report([run]))
    found = evaluate.evaluate(run, resamples=20, names=["age"])
    page = Page(report.write_report([run]))
    alone = f"{100 * found['pictures_alone']['auroc']:.0f} %"
    assert f"takes the patient&#39;s age into account; from the pictures alone it is {alone}." in page.text
    assert "into account" not in plain.text
    breasts = report._breasts(runs.open_run(run), evaluate.out_of_fold(runs.open_run(run)), found)
    assert roc_auc_score(breasts["cancer"], breasts["prediction"]) == pytest.approx(found["breast"]["auroc"])


def test_figures_take_the_colour_of_the_page(page):
    assert "#010203" not in page.text
    assert "currentColor" in page.text


def test_ids_that_are_jumped_to_exist(page):
    targets = set(re.findall(r'href="#([\w-]+)"', page.text.split("<h3")[0]))
    assert targets
    assert all(f'id="{target}"' in page.text for target in targets)


def test_an_unfinished_run_is_reported_as_such(tmp_path):
    text = Page(report.write_report([make_run(tmp_path / "run", finished=False)])).text
    assert "nothing to judge" in text
    assert "No epoch has ended yet" in text


def test_a_run_without_positives_has_no_ranking(tmp_path):
    text = Page(report.write_report([make_run(tmp_path / "run", positives=False)])).text
    assert "ranking cannot be judged" in text
    assert 'aria-label="ROC"' not in text


def test_many_runs_are_compared_and_few_shown_in_full(tmp_path):
    many = [make_run(tmp_path / f"run{index:02d}", folds=1, finished=index < 5) for index in range(50)]
    text = Page(report.write_report(many, tmp_path / "all.html")).text
    assert all(f"run{index:02d}" in text for index in range(50))
    assert f"run03: the first {report.MOST_IN_FULL} named are shown in full" in text


def test_a_runs_distance_from_the_best_is_that_on_the_breasts_of_both(tmp_path):
    one, other = make_run(tmp_path / "one"), make_run(tmp_path / "other")
    for path in other.glob("fold*/validation.csv"):
        table = pd.read_csv(path, dtype={"image_id": str, "prediction_id": str, "patient_id": str})
        table.assign(prediction=np.random.default_rng(0).random(len(table))).to_csv(path, index=False)
    text = Page(report.write_report([other, one], tmp_path / "both.html")).text
    breasts = [metrics.per_breast(evaluate.out_of_fold(runs.open_run(run))) for run in (one, other)]
    found = intervals.auroc_lead(*breasts)
    low, high = found["interval"]
    assert low > 0
    assert f"{found['lead']:.3f} ({low:.3f} to {high:.3f})" in text


def test_ids_with_markup_are_shown_as_text(tmp_path):
    text = Page(report.write_report([make_run(tmp_path / "<b>run & co")])).text
    assert "&lt;b&gt;run &amp; co" in text
    assert "<b>run" not in text


def test_a_folder_that_is_no_run_is_an_error(tmp_path):
    with pytest.raises(RunError, match="no trained fold"):
        report.write_report([tmp_path])


def test_bands_hold_the_curve_and_narrow_with_more_patients():
    generator = np.random.default_rng(3)
    widths = []
    for count in (60, 2000):
        labels = (np.arange(count) % 2).astype(float)
        scores = labels + generator.normal(0, 1.5, count)
        grid, low, high = figures.bands(labels, scores, np.arange(count), resamples=60)[0]
        false_positive, true_positive, _ = roc_curve(labels, scores)
        inner = np.interp(grid, false_positive, true_positive)[10:90]
        assert np.mean((low[10:90] <= inner) & (inner <= high[10:90])) > 0.95
        widths.append(float(np.mean(high - low)))
    assert widths[1] < widths[0] / 3


def test_several_runs_lie_over_one_another(tmp_path):
    found = [make_run(tmp_path / name, folds=1) for name in ("one", "two")]
    text = Page(report.write_report(found, tmp_path / "both.html")).text
    assert "2 of 2 runs can be judged" in text
    assert 'aria-label="ROC of the runs"' in text


def test_the_chosen_threshold_is_marked_and_small_subgroups_are_faint(page):
    assert page.text.count('<tr class="chosen">') == 1
    assert '<tr class="few">' not in page.text  # each group here has more than ten cancers
    few = sections.subgroups({"subgroups": [_part("site_id", "1", 3), _part("site_id", "2", 30)]})
    assert [row["_class"] for row in few] == ["few", ""]


def test_subgroups_are_in_the_order_that_a_reader_expects():
    values = {"machine_id": ["170", "21", "900"], "age": ["50-59", "70+", "<50", "unknown"], "implant": ["0.0", "1.0"]}
    parts = [_part(group, value, 30) for group, found in values.items() for value in found]
    rows = [(row["group"], row["value"]) for row in sections.subgroups({"subgroups": parts})]
    assert rows == [
        *(("machine", value) for value in ("21", "170", "900")),
        *(("age", value) for value in ("<50", "50-59", "70+", "unknown")),
        *(("implant", value) for value in ("no", "yes")),
    ]


def _part(group, value, positives):
    figures = dict.fromkeys(("auroc", "average_precision", "pf1", "log_loss"), 0.5)
    return {"group": group, "value": value, "count": 100, "positives": positives, **figures}


def test_resources_of_each_fold_are_in_the_table(tmp_path):
    root = make_run(tmp_path / "run", folds=1)
    summary = {
        "kind": "summary",
        "time": 300,
        "step": 3,
        "advice": "Fine.",
        "shares": {"data": 0.25, "compute": 0.75},
        "cpu_percent_mean": 151.6,
        "rss_mb_peak": 901.2,
        "gpu0.utilisation_mean": 95.4,
        "gpu0.memory_mb_peak": 1e4,
        "gpu0.energy_j_peak": 12_400.0,
    }
    with (root / "fold0/metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(summary) + "\n")
    assert sections.used(runs.open_run(root)) == [
        {
            "fold": "0",
            "% waiting for data": "25.0",
            "% in transfer": "0.0",
            "% in compute": "75.0",
            "CPU %, mean": 152,
            "RAM MiB, peak": 901,
            "GPU0 %, mean": 95,
            "GPU0 MiB, peak": 10000,
            "GPU0 kJ": 12,
        }
    ]


def test_what_a_fold_used_is_of_all_calls_that_trained_it_and_each_figure_is_below_its_name(tmp_path):
    root = make_run(tmp_path / "run", folds=2)
    of_gpu = {"gpu0.utilisation_mean": 90.0, "gpu0.memory_mb_peak": 8e3, "gpu0.energy_j_peak": 9e6}
    first = {"samples": 300, "rss_mb_peak": 64e3, "cpu_percent_mean": 100.0, "shares": {"compute": 1.0}, **of_gpu}
    resumed = {"samples": 100, "rss_mb_peak": 900.0, "cpu_percent_mean": 200.0, "gpu0.energy_j_peak": 5e4}
    resumed |= {"shares": {"compute": 0.6, "data": 0.4}}
    plain = {"samples": 5, "rss_mb_peak": 10.0, "cpu_percent_mean": 50.0, "shares": {"compute": 1.0}}
    for fold, summaries in enumerate(([plain], [first, resumed])):
        lines = [json.dumps({"kind": "summary", "time": 1, "step": 1, "advice": "", **each}) for each in summaries]
        (root / f"fold{fold}/metrics.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    on_cpu, on_gpu = sections.used(runs.open_run(root))
    assert list(on_cpu) == list(on_gpu)
    assert on_cpu["GPU0 kJ"] is None
    assert (on_gpu["GPU0 kJ"], on_gpu["RAM MiB, peak"], on_gpu["CPU %, mean"]) == (9050, 64000, 125)
    assert (on_gpu["% waiting for data"], on_gpu["GPU0 %, mean"]) == ("10.0", 90)


def test_figures_are_made_anew_where_folds_or_predictions_are_others_than_they_were_of(tmp_path):
    root, more = make_run(tmp_path / "run", folds=1), make_run(tmp_path / "more", folds=2)
    summary = root / "fold0" / runs.SUMMARY
    summary.unlink()
    evaluate.evaluate(root, resamples=20, names=["age"])
    assert "not finished in fold(s) 0" in Page(report.write_report([root])).text
    summary.write_text("{}")  # ended without a better epoch: the predictions are the same
    text = Page(report.write_report([root])).text
    assert "not finished in fold(s)" not in text
    assert "age into account" in text  # as it was evaluated
    (more / "fold1").rename(root / "fold1")  # with its older times
    assert "Judged on 160 breasts" in Page(report.write_report([root])).text
    evaluate.evaluate(root, resamples=20)
    earlier = {key: value for key, value in json.loads((root / runs.METRICS).read_text()).items() if key != "format"}
    (root / runs.METRICS).write_text(json.dumps(earlier | {"threshold": {"value": 0.5}}))  # of an earlier version
    assert "Judged on 160 breasts" in Page(report.write_report([root])).text
    saved = (root / runs.METRICS).stat().st_mtime_ns
    report.write_report([root])
    assert (root / runs.METRICS).stat().st_mtime_ns == saved


def test_runs_of_one_name_are_told_apart_and_one_given_twice_is_one(tmp_path):
    found = [make_run(tmp_path / name / "default", folds=1) for name in ("one", "two")]
    text = Page(report.write_report([*found, found[0]], tmp_path / "both.html")).text
    assert "2 of 2 runs can be judged" in text
    assert "Run one/default" in text
    assert "Run two/default" in text


def test_ranking_worse_than_chance_is_called_that(tmp_path):
    root = make_run(tmp_path / "run", folds=1)
    path = root / "fold0" / runs.VALIDATION
    table = pd.read_csv(path, dtype=str)
    run_files.write_table(path, table.assign(prediction=1 - table["prediction"].astype(float)))
    text = Page(report.write_report([root])).text
    assert "worse than chance" in text
    assert "not distinguishable" not in text


def test_cancers_are_missed_where_their_breast_is_below_the_threshold(monkeypatch):
    frame = pd.DataFrame(
        {
            "image_id": ["a", "b", "c", "d", "e"],
            "prediction_id": ["1_L", "1_L", "2_L", "3_L", "4_R"],
            "cancer": [1.0, 1.0, 1.0, 1.0, 0.0],
            "prediction": [0.9, 0.2, 0.4, 0.3, 0.6],
        }
    )
    breasts = pd.DataFrame({"prediction_id": ["1_L", "2_L", "3_L", "4_R"], "prediction": [0.55, 0.4, 0.3, 0.6]})
    monkeypatch.setattr(report_pictures, "_overlays", lambda *given: {})
    monkeypatch.setattr(
        report_pictures, "_thumbnail", lambda store, row: {"image": row["image_id"], "caption": "", "uri": ""}
    )
    store: Any = SimpleNamespace(manifest=frame)

    def shown(threshold):
        groups = report_pictures.cases(None, store, frame, breasts, threshold)  # pyright: ignore[reportArgumentType]
        return {group["title"].split(" ")[1]: [p["image"] for p in group["pictures"]] for group in groups}

    assert shown(0.5) == {"found": ["a", "b"], "missed": ["d", "c"], "pictures": ["e"]}
    assert shown(0.1) == {"found": ["a", "c", "d", "b"], "pictures": ["e"]}


def test_of_many_groups_the_largest_are_drawn_and_the_title_says_so():
    sizes = {f"m{number:02d}": number + 1 for number in range(30)}
    rows = pd.DataFrame({"machine_id": [name for name, size in sizes.items() for _ in range(size)], "cancer": 0.0})
    drawn = report._balance(rows, "machine_id", "Classes by machine")
    assert "Classes by machine, the 24 largest of 30" in drawn
    assert "largest" not in report._balance(rows[rows["machine_id"] > "m10"], "machine_id", "Classes by machine")


def test_a_picture_and_its_overlay_are_cut_to_the_breast_with_a_gap_between():
    pair = np.zeros((100, 120, 3), np.uint8)
    pair[20:60, 10:30], pair[20:60, 70:90] = 200, 250  # the breast, and the breast under its map
    row = pd.Series({"source_rows": 1000, "crop_top": 200, "crop_left": 100, "crop_height": 400, "crop_width": 200})
    cut = report_pictures._cropped(pair, row)
    assert cut.shape == (40, 42, 3)
    assert (cut[:, :20] == 200).all()
    assert (cut[:, 20:22] == 128).all()
    assert (cut[:, 22:] == 250).all()
