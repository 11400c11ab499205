"""What people do with quantizers around an accelerated model: rows 7 and 14 of the field report."""

import copy

import pytest
import torch

import flashnorm
from flashnorm.kernels import dispatch
from tests.errors import relative
from tests.quantized import decoding
from tests.quantized.models import ORIGINS, N, dequantized, rows, toy
from tests.quantized.test_accelerate import bound, run

QUANTIZERS = ["torchao int8", "torchao intx", "bitsandbytes nf4", "gptq"]


@pytest.fixture(params=["no decoder", "a decoder"])
def backend(request, monkeypatch):
    """With and without kernels that read packed weights."""
    if request.param == "a decoder":
        decoding.install(monkeypatch)
    return request.param


@pytest.mark.parametrize("origin", QUANTIZERS)
def test_quantized_and_then_accelerated(origin, backend):
    """Huge pages touched a tensor subclass: RuntimeError ... invalid python storage."""
    x = rows(5, N)
    model = ORIGINS[origin](toy())
    own = run(copy.deepcopy(model), x)
    with torch.no_grad():
        flashnorm.accelerate_(model, (x,), huge_pages=True)
    # On some processors bitsandbytes' own code multiplies in bfloat16.
    half = torch.bfloat16 if "bitsandbytes" in origin else None
    truth = run(dequantized(model), x.double())
    assert relative(run(model, x).double(), truth) <= bound(torch.float32, half)
    flashnorm.restore_(model)
    assert torch.equal(run(model, x), own)


@pytest.mark.parametrize("origin", QUANTIZERS)
def test_accelerated_and_then_quantized(origin, backend):
    """What replaces layers, or their weights, is noticed; later it is taken."""
    x = rows(5, N)
    model = toy()
    with torch.no_grad():
        flashnorm.accelerate_(model, (x,))
    run(model, x)
    ORIGINS[origin](model.eval())
    plain = ORIGINS[origin](toy())
    assert relative(run(model, x).double(), run(plain, x).double()) <= bound(torch.float32)
    flashnorm.restore_(model)
    with torch.no_grad():
        flashnorm.accelerate_(model, (x,))
    reasons = [part.reason for part in flashnorm.acceleration(model).parts if part.reason]
    repacked = any("packed its weight anew" in reason for reason in reasons)
    if backend == "a decoder" and not repacked:
        assert reasons == []
        truth = run(dequantized(model), x.double())
        before = dict(dispatch.fallbacks())
        assert relative(run(model, x).double(), truth) <= bound(torch.float32)
        assert dict(dispatch.fallbacks()) == before
    flashnorm.restore_(model)
    assert torch.equal(run(model, x), run(plain, x))


def test_an_adapter_over_quantized_layers(backend):
    """LoRA wraps the layers of an accelerated model: the base is still a kernel's, or its own."""
    peft = pytest.importorskip("peft", reason="PEFT is not installed")
    pytest.importorskip("torchao", reason="torchao is not installed")
    from tests.quantized.test_generate import PROMPT, llama

    def adapted(model):
        torch.manual_seed(2)
        config = peft.LoraConfig(r=4, target_modules=["q_proj", "up_proj"], init_lora_weights=False)
        return peft.get_peft_model(model, config).eval()

    plain = ORIGINS["torchao int8"](llama())
    model = copy.deepcopy(plain)
    flashnorm.accelerate_(model)
    with torch.no_grad():
        first, second = adapted(plain)(PROMPT).logits, adapted(model)(PROMPT).logits
    assert relative(second.double(), first.double()) <= bound(torch.float32)
