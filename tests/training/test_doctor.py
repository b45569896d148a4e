from __future__ import annotations

import pytest

from training import doctor


@pytest.fixture(scope="module")
def checks():
    return doctor.examine()


def test_this_machine_can_run_the_main_job(checks):
    assert [check for check in checks if check.needed and not check.ok] == []
    assert doctor.usable(checks)


def test_every_encoding_is_really_decoded(checks):
    found = {check.name: check.found for check in checks if check.name.startswith("decode ")}
    assert len(found) == 5
    assert all(found.values())


def test_a_wrong_decode_is_found(monkeypatch):
    import numpy as np

    from preprocessing import decode

    right = decode.decode

    def wrong(path, settings):
        decoded = right(path, settings)
        np.asarray(decoded.stored)[0, 0] += 1
        return decoded

    monkeypatch.setattr(decode, "decode", wrong)
    found = doctor._decoders()
    assert not any(check.ok for check in found)
    assert not doctor.usable(found)


def test_a_missing_package_says_what_to_do(monkeypatch):
    monkeypatch.setattr(doctor, "NEEDED_PACKAGES", ("no-such-package-at-all",))
    missing = doctor._package("no-such-package-at-all")
    assert not doctor.usable([missing])
    assert "make install" in missing.advice


def test_what_is_broken_is_told_not_raised():
    def broken():
        raise OSError("libcuda.so is missing\nand more")

    check = doctor._guarded("torch", broken)
    assert check.found == "does not work: libcuda.so is missing"
    assert not check.ok


@pytest.mark.parametrize("there", [True, False])
def test_the_codec_for_stores_follows_the_gpu(monkeypatch, there):
    monkeypatch.setattr("preprocessing.gpu_decode.gpu_answers", lambda: there)
    assert ("htj2k" in doctor._codec().found) == there
