"""Parts that can be turned off."""

import pytest

from flashnorm.errors import FlashNormError
from flashnorm.kernels.gpu import launch, switches


@pytest.fixture(autouse=True)
def nothing_said(monkeypatch):
    monkeypatch.delenv(switches.VARIABLE, raising=False)
    monkeypatch.setattr(switches, "_off", None)


def test_a_context_turns_off_and_on_again():
    assert all(map(switches.on, switches.NAMES))
    with switches.off("early", "attention"):
        assert [name for name in switches.NAMES if not switches.on(name)] == ["early", "attention"]
        with switches.off("residual"):
            assert switches.turned_off() == ("attention", "early", "residual")
        assert switches.on("residual")
    assert not switches.turned_off()


def test_the_environment_turns_off(monkeypatch):
    monkeypatch.setenv(switches.VARIABLE, "residual, early")
    assert switches.turned_off() == ("early", "residual")


def test_a_name_that_is_none(monkeypatch):
    said = "no part 'fast'; there are early, attention, residual, deferral"
    with pytest.raises(FlashNormError, match=f"off: {said}"), switches.off("fast"):
        pass
    monkeypatch.setattr(switches, "_off", None)
    monkeypatch.setenv(switches.VARIABLE, "fast")
    with pytest.raises(FlashNormError, match=f"FLASHNORM_GPU_OFF: {said}"):
        switches.on("early")


def test_early_starts_are_hopper_s_and_can_be_turned_off(monkeypatch):
    monkeypatch.setattr(launch, "interpreted", lambda: False)
    hopper, ampere = launch.HOPPER, launch.Device("sm_80", (8, 0), 108)
    assert hopper.starts_early
    assert not ampere.starts_early
    with switches.off("early"):
        assert not hopper.starts_early
