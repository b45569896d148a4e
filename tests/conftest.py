"""Fixtures that several packages' tests share."""

from __future__ import annotations

from pathlib import Path

import pytest

REAL_DATA = Path(__file__).resolve().parents[2] / "shared" / "data"


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real images beside the checkout; a user's checkout has none, and the test skips."""
    if not REAL_DATA.is_dir():
        pytest.skip("needs the real images beside the checkout (../shared/data), which are not there")
    return REAL_DATA
