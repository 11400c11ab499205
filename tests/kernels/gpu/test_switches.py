"""Parts that can be turned off."""

import pytest
import torch

import flashnorm
from flashnorm.errors import FlashNormError
from flashnorm.kernels import dispatch
from flashnorm.kernels.gpu import launch, policy, switches
from flashnorm.kernels.gpu.backend import GpuAttention, GpuBackend
from flashnorm.runtime.accelerate import RECORD
from flashnorm.runtime.spec import read_spec
from tests.runtime.models import LLAMA, tiny


class Standing(GpuBackend):
    """The GPU's policy for models on the CPU, of which no kernel is called."""

    def __init__(self):
        rest = (policy.LIMITS, policy.POLICY, policy.COMPILED, GpuAttention())
        super().__init__("standing", "cpu", *rest, keeps=False)

    def claims(self, x):
        return True

    def available(self, device):
        return True, "kernels that stand for those of a GPU"


def accelerated():
    return flashnorm.accelerate_(tiny(LLAMA, torch.float32))


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


def test_a_model_is_accelerated_without_what_is_off():
    """Its kernels are described, and its attention chosen, once."""
    backend = Standing()
    dispatch.register(backend)
    try:
        whole = accelerated()
        with switches.off("residual", "attention", "deferral"):
            less = accelerated()
    finally:
        dispatch.unregister(backend)
    for model, on in ((whole, True), (less, False)):
        spec = read_spec(model.model.layers[0].self_attn.o_proj.forward.kernel.written)
        assert (spec.alone, spec.fuses, spec.defers) == (on, on, on)
        said = flashnorm.acceleration(model).attention
        assert said == ("" if on else "attention by a kernel is turned off")
        assert bool(vars(model)[RECORD].alone) == on
