"""Models in half precision that read sound, images or series: default inputs in their own dtype."""

import pytest
import torch
from torch import nn

import flashnorm
from flashnorm.graph.inputs import example_inputs
from tests.zoo import randomize_
from tests.zoo.further import further_model

# One of each kind of input, and text alone.
KINDS = ("whisper", "wav2vec2", "vit", "clip", "patchtst", "speech_to_text", "bert")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_field_half_precision_is_inspected_as_float32_is(kind, dtype):
    model, _ = further_model(kind)
    expected = flashnorm.inspect(model)
    found = flashnorm.inspect(model.to(dtype))
    assert [site.path for site in found.sites] == [site.path for site in expected.sites]
    assert [site.consumers for site in found.sites] == [site.consumers for site in expected.sites]


def test_field_a_stored_half_precision_model_is_inspected(tmp_path):
    model, _ = further_model("whisper")
    model.to(torch.bfloat16).save_pretrained(tmp_path / "model")
    assert '"bfloat16"' in (tmp_path / "model" / "config.json").read_text()
    assert flashnorm.inspect(tmp_path / "model").folded
    assert flashnorm.inspect(tmp_path / "model" / "config.json").folded


def test_field_numbers_have_the_dtype_of_the_parameter_they_meet():
    """Most of the parameters are in another dtype than those that the input meets."""

    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.enter = nn.Linear(64, 8).half()
            self.norm = nn.RMSNorm(8).bfloat16()
            self.leave = nn.Linear(8, 4000).bfloat16()
            self.config = type("Config", (), {"hidden_size": 64})()

        def forward(self, inputs_embeds):
            return self.leave(self.norm(self.enter(inputs_embeds).bfloat16()))

    model = Mixed()
    randomize_(model, 0)
    assert len(flashnorm.inspect(model).folded) == 1
    dtypes = [given["inputs_embeds"].dtype for given in example_inputs(model)]
    assert dtypes[:2] == [torch.bfloat16, torch.float16]


def test_field_a_default_mask_is_finite_in_every_dtype():
    model, _ = further_model("bert")
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        for given in example_inputs(model.to(dtype)):
            for value in given.values():
                assert not isinstance(value, torch.Tensor) or bool(torch.isfinite(value).all())
