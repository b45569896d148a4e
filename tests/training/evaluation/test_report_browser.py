"""The report in headless Chromium: nothing asked of a network, nothing wrong, everything seen, at two widths."""

from __future__ import annotations

import itertools
import shutil
from pathlib import Path

import pytest

from tests.training.evaluation.test_report import make_run
from training.evaluation import report

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
pytestmark = [
    pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="needs Debian's chromium and chromium-driver"),
    pytest.mark.slow,
]


@pytest.fixture(scope="module")
def browser():
    webdriver = pytest.importorskip("selenium.webdriver", reason="needs selenium")
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    yield driver
    driver.quit()


@pytest.fixture(scope="module")
def pages(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("browser")
    good = make_run(root / "good")
    sets = {
        "good": [good],
        "unfinished": [make_run(root / "unfinished", finished=False)],
        "without positives": [make_run(root / "negative", positives=False)],
        "several": [good, make_run(root / "other", folds=1), make_run(root / "begun", finished=False)],
        "fifty": [make_run(root / f"run-{number:02d}", folds=1, finished=number % 5 < 4) for number in range(50)],
    }
    return {name: report.write_report(found, root / f"{name}.html") for name, found in sets.items()}


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [400, 1400])
@pytest.mark.parametrize("name", ["good", "unfinished", "without positives", "several", "fifty"])
def test_page_is_whole_in_a_browser(browser, pages, name, width, scheme):
    command = browser.execute_cdp_cmd
    metrics = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    command("Emulation.setDeviceMetricsOverride", metrics)
    command("Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": scheme}]})
    for kind in ("browser", "performance"):  # forget what came before
        browser.get_log(kind)
    browser.get(pages[name].as_uri())

    assert browser.get_log("browser") == []
    traffic = "".join(entry["message"] for entry in browser.get_log("performance"))
    assert "Network.loadingFailed" not in traffic
    assert '"url":"http' not in traffic
    sizes = browser.execute_script(
        "return [...document.querySelectorAll('svg, img')].map(e => e.getBoundingClientRect())"
        ".map(box => [box.width, box.height])"
    )
    assert all(wide > 100 and high > 60 for wide, high in sizes)
    assert len(sizes) >= (0 if name == "unfinished" else 8)
    # Wide tables scroll in their own frame; the page itself never does.
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width
    assert _contrast(browser) >= 4.5
    dark = browser.execute_script("return getComputedStyle(document.body).backgroundColor")
    assert (sum(_rgb(dark)) < 150) == (scheme == "dark")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_page_prints_dark_on_white_with_nothing_cut_off(browser, pages, scheme):
    command = browser.execute_cdp_cmd
    paper = {"width": 700, "height": 990, "deviceScaleFactor": 1, "mobile": False}  # A4 within its margins, at 96 dpi
    command("Emulation.setDeviceMetricsOverride", paper)
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    command("Emulation.setEmulatedMedia", {"media": "print", "features": features})
    try:
        browser.get(pages["good"].as_uri())
        ink = browser.execute_script("return getComputedStyle(document.body).color")
        assert sum(_rgb(ink)) < 100
        overflow = "return [...document.querySelectorAll('.scroll')].map(e => e.scrollWidth - e.clientWidth)"
        assert max(browser.execute_script(overflow)) <= 0
        assert (
            min(
                browser.execute_script(
                    "return [...document.querySelectorAll('pre')].map(e => e.getBoundingClientRect().height)"
                )
            )
            > 100
        )  # the settings, which the screen keeps folded
    finally:
        command("Emulation.setEmulatedMedia", {"media": "screen", "features": []})


def test_headings_go_down_one_level_at_a_time(browser, pages):
    for page in pages.values():
        browser.get(page.as_uri())
        levels = browser.execute_script(
            "return [...document.querySelectorAll('h1, h2, h3, h4')].map(e => Number(e.tagName[1]))"
        )
        assert levels[0] == 1
        assert all(after - before <= 1 for before, after in itertools.pairwise(levels))


def _rgb(text: str) -> list[float]:
    return [float(part) for part in text[text.index("(") + 1 : -1].split(",")[:3]]


def _contrast(browser) -> float:
    """The least contrast (WCAG 2.1, 1.4.3) of soft, plain and warning text on what lies behind it."""
    script = """
    return ['body', '.soft', '.warning', 'footer', 'a'].map(s => document.querySelector(s)).filter(e => e).map(e => {
      let behind = e;
      while (getComputedStyle(behind).backgroundColor == 'rgba(0, 0, 0, 0)') behind = behind.parentElement;
      return [getComputedStyle(e).color, getComputedStyle(behind).backgroundColor];
    })"""
    found = []
    for ink, paper in browser.execute_script(script):
        light = sorted((_luminance(_rgb(ink)), _luminance(_rgb(paper))), reverse=True)
        found.append((light[0] + 0.05) / (light[1] + 0.05))
    return min(found)


def _luminance(rgb: list[float]) -> float:
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in (part / 255 for part in rgb)]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
