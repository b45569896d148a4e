"""Draws the README's pictures from what `make demo` made: `python docs/assets.py [DEMO]`, or `make docs-assets`.

Needs Debian's chromium and chromium-driver for the report's. The demo holds synthetic pictures and eight of CBIS-DDSM
(CC BY 3.0) and no others, so these may be shown.
"""

from __future__ import annotations

import base64
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from dali_pipes.preview import draw_sheet  # noqa: E402 (the path comes first)
from preprocessing.manifest import open_store  # noqa: E402
from preprocessing.preview import draw_gallery  # noqa: E402

ASSETS = ROOT / "docs" / "assets"
QUALITY = 82  # of WebP
WIDTH = 1180  # of the report's window, in CSS pixels


def draw(demo: Path) -> list[Path]:
    """Draw all pictures; returns their paths."""
    store = demo / "store"
    with tempfile.TemporaryDirectory() as scratch:
        pictures = demo / "data" / "train_images"
        crops = cv2.imread(str(draw_gallery(store, Path(scratch) / "crops.png", pictures, count=24)))
        sheet = cv2.imread(str(draw_sheet(open_store(store), Path(scratch) / "sheet.png", images=3, variants=4)))
    assert crops is not None
    assert sheet is not None
    found = [_save("crops", np.asarray(crops), 1600), _save("augmentation", np.asarray(sheet), 1400)]
    with _Browser(demo / "report.html") as page:
        for scheme in ("light", "dark"):
            found.append(_save(f"report-{scheme}", page.shot(scheme, "body", "h3"), WIDTH))
            found.append(_save(f"cases-{scheme}", page.shot(scheme, "section:4", "section:5"), WIDTH))
    return found


def _save(name: str, picture: NDArray[np.uint8], width: int) -> Path:
    if picture.shape[1] > width:
        height = round(picture.shape[0] * width / picture.shape[1])
        picture = np.asarray(cv2.resize(picture, (width, height), interpolation=cv2.INTER_AREA), np.uint8)
    path = ASSETS / f"{name}.webp"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(cv2.imencode(".webp", picture, [cv2.IMWRITE_WEBP_QUALITY, QUALITY])[1].tobytes())
    return path


class _Browser:
    """The report in headless Chromium."""

    def __init__(self, page: Path) -> None:
        self._page = page.resolve()

    def __enter__(self) -> _Browser:
        from selenium import webdriver

        chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
        if not (chromium and driver):
            sys.exit("The report's pictures need Chromium: apt-get install chromium chromium-driver")
        options = webdriver.ChromeOptions()
        options.binary_location = chromium
        for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"):
            options.add_argument(argument)
        self._driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
        return self

    def __exit__(self, *error: object) -> None:
        self._driver.quit()

    def shot(self, scheme: str, first: str, last: str) -> NDArray[np.uint8]:
        """The page from the top of one element to that of another; `section:4` is the fourth section."""
        command = self._driver.execute_cdp_cmd
        size: dict[str, Any] = {"width": WIDTH, "height": 900, "deviceScaleFactor": 1, "mobile": False}
        command("Emulation.setDeviceMetricsOverride", size)
        command("Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": scheme}]})
        self._driver.get(self._page.as_uri())
        top, bottom = (self._top(place) for place in (first, last))
        clip = {"x": 0, "y": max(0, top - 24), "width": WIDTH, "height": bottom - max(0, top - 24) - 8, "scale": 1}
        taken = command("Page.captureScreenshot", {"captureBeyondViewport": True, "clip": clip})["data"]
        picture = cv2.imdecode(np.frombuffer(base64.b64decode(taken), np.uint8), cv2.IMREAD_COLOR)
        return np.asarray(picture, np.uint8)

    def _top(self, place: str) -> float:
        kind, _, number = place.partition(":")
        selector = f".{kind}" if number else kind
        script = "return document.querySelectorAll(arguments[0])[arguments[1]].getBoundingClientRect().top + scrollY"
        return self._driver.execute_script(script, selector, int(number or 1) - 1)


if __name__ == "__main__":
    for path in draw(Path(sys.argv[1] if len(sys.argv) > 1 else "demo")):
        print(f"{path.relative_to(ROOT)}: {path.stat().st_size / 1024:.0f} KiB")  # noqa: T201
