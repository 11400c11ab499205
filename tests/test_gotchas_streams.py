"""What breaks folds where there is more than one stream, sequence, half or precision.

Named as in tests/test_gotchas.py. Errors are max |Δ| / max |value| in float64 throughout.
"""

import copy
import re

import pytest
import torch
from torch import nn

import flashnorm
from flashnorm.algebra import center_
from flashnorm.verification.bounds import HALF_RATIO
from flashnorm.verification.precision import float64_truth
from tests.forcing import force_
from tests.zoo import randomize_, tiny_inputs, tiny_model
from tests.zoo.coverage import EXACT
from tests.zoo.fold import fold_outcome

WIDTH, LAYERS = 64, 2
LARGE = 1e-2  # what a wrong rewrite moves


def outputs(model, inputs):
    with float64_truth():
        return copy.deepcopy(model)(**copy.deepcopy(inputs))


def error(found, expected):
    return ((found - expected).abs().max() / expected.abs().max()).item()


def fold_and_center(name):
    """The plan, and what it changes."""
    model = tiny_model(name).double()
    inputs = tiny_inputs(model)
    before = outputs(model, inputs).logits
    plan = flashnorm.folding(flashnorm.fold_(model, copy.deepcopy(inputs), center=True))
    return plan, error(outputs(model, inputs).logits, before)


def centered(plan, kind):
    return [s.path for s in plan.sites if s.kind == kind and s.centering == "folded"]


def readers(plan, pattern):
    """The parameters that absorb the gains of all matching sites."""
    found = [site for site in plan.sites if re.search(pattern, site.path)]
    assert found, f"no site matches {pattern}: {[s.path for s in plan.sites]}"
    return {consumer.parameter for site in found for consumer in site.consumers}


def error_of_centering(name, writers):
    """What centering the matching parameters changes, which write the residual stream."""
    model = tiny_model(name).double()
    inputs = tiny_inputs(model)
    before = outputs(model, inputs).logits
    found = [(n, p) for n, p in model.named_parameters() if re.search(writers, n)]
    assert found
    with torch.no_grad():
        for parameter_name, parameter in found:
            embeds = "embed" in parameter_name or parameter.ndim == 1
            center_(parameter, parameter.ndim - 1 if embeds else 0)
    return error(outputs(model, inputs).logits, before)


STREAMS = ["deepseek_v4", "hy_v4", "qwen4_exp", "gemma3n_text", "inkling2_text"]
EMBEDDINGS = r"(^|\.)(embed_tokens|embed)\.weight$"


@pytest.mark.parametrize("name", STREAMS)
def test_gotcha_09_multi_stream_residuals_fold_but_are_not_centered(name):
    plan, change = fold_and_center(name)
    assert plan.folded
    assert change < EXACT
    assert not centered(plan, "rms")
    assert error_of_centering(name, EMBEDDINGS) > LARGE
    assert not [c for c in plan.centerings if re.search(EMBEDDINGS, c.parameter)]


def t5():
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(
        vocab_size=99,
        d_model=WIDTH,
        d_kv=16,
        d_ff=80,
        num_layers=LAYERS,
        num_decoder_layers=LAYERS,
        num_heads=4,
    )
    return _seq2seq(T5ForConditionalGeneration, config)


def bart():
    from transformers import BartConfig, BartForConditionalGeneration

    config = BartConfig(vocab_size=99, d_model=WIDTH, **_ENCODER_DECODER)
    return _seq2seq(BartForConditionalGeneration, config)


def whisper():
    from transformers import WhisperConfig, WhisperForConditionalGeneration

    config = WhisperConfig(
        vocab_size=99,
        d_model=WIDTH,
        num_mel_bins=8,
        max_source_positions=12,
        max_target_positions=32,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=3,
        **_ENCODER_DECODER,
    )
    return _seq2seq(WhisperForConditionalGeneration, config)


_ENCODER_DECODER = {
    f"{side}_{name}": value
    for side in ("encoder", "decoder")
    for name, value in (("layers", LAYERS), ("attention_heads", 4), ("ffn_dim", 80))
}


def _seq2seq(cls, config):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = cls._from_config(config, attn_implementation="eager", dtype=torch.float64).eval()
    randomize_(model, 0)
    return model


def seq2seq_inputs(model):
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(4, 90, (2, 12), generator=generator)
    inputs = {"decoder_input_ids": ids[:, :7]}
    if model.main_input_name == "input_features":
        features = torch.randn(2, 8, 24, generator=generator)
        return inputs | {"input_features": features.double()}
    return inputs | {"input_ids": ids[:, 7:]}


class OnlyLogits(nn.Module):
    """An encoder-decoder that does not return its encoder's output."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, **inputs):
        return self.model(**inputs, use_cache=False).logits


CROSS = tuple(
    f"decoder.layers.{i}.encoder_attn.{n}" for i in range(LAYERS) for n in ("k_proj", "v_proj")
)
T5_CROSS = tuple(
    f"decoder.block.{i}.layer.1.EncDecAttention.{n}" for i in range(LAYERS) for n in "kv"
)
# The encoder's final norm, and what reads it.
ENCODERS = {
    t5: (r"encoder\.final_layer_norm$", T5_CROSS),
    bart: (r"encoder\.layers\.1\.final_layer_norm$", CROSS),
    whisper: (r"encoder\.layer_norm$", CROSS),
}


@pytest.mark.parametrize("make", ENCODERS)
def test_gotcha_19_the_encoders_norm_is_read_by_every_decoder_layer(make):
    model, (norm, expected) = make(), ENCODERS[make]
    inputs = seq2seq_inputs(model)
    wrapped = OnlyLogits(model)
    before = outputs(wrapped, inputs)
    plan = flashnorm.folding(flashnorm.fold_(wrapped, inputs))
    found = {re.sub(r"^(model\.)+|\.weight$", "", name) for name in readers(plan, norm)}
    assert found == set(expected)
    assert error(outputs(wrapped, inputs), before) < EXACT


@pytest.mark.parametrize("make", ENCODERS)
def test_gotcha_19_an_encoder_output_that_is_returned_keeps_its_gain(make):
    model = make()
    inputs = seq2seq_inputs(model)
    before = outputs(model, inputs)
    plan = flashnorm.folding(flashnorm.fold_(model, inputs))
    (site,) = [s for s in plan.sites if re.search(ENCODERS[make][0], s.path)]
    assert site.gain_state == "kept"
    assert "the model returns its output" in site.reason
    after = outputs(model, inputs)
    assert error(after.logits, before.logits) < EXACT
    assert error(after.encoder_last_hidden_state, before.encoder_last_hidden_state) < EXACT


def test_gotcha_19_folding_it_all_the_same_changes_what_the_encoder_returns():
    model = t5()
    inputs = seq2seq_inputs(model)
    before = outputs(model, inputs)
    force_(model, inputs, ["encoder.final_layer_norm.weight"])
    after = outputs(model, inputs)
    assert error(after.logits, before.logits) < EXACT
    assert error(after.encoder_last_hidden_state, before.encoder_last_hidden_state) > LARGE


@pytest.mark.parametrize("name", ["zamba", "zamba2"])
def test_gotcha_22_a_norm_over_hidden_states_and_embeddings(name):
    outcome = fold_outcome(name, with_inputs=True)
    found = [s for s in outcome.plan.sites if re.search(r"shared_transf\w*\.input_layer", s.path)]
    assert {(site.width, site.gain_state) for site in found} == {(2 * WIDTH, "folded")}
    assert {span for s in found for c in s.consumers for span in c.spans} == {
        flashnorm.Span(0, 0, 2 * WIDTH)
    }
    assert outcome.error < EXACT


class NextToken(nn.Module):
    """The entrance of a multi-token predictor: two norms side by side into one projection."""

    def __init__(self, residual):
        super().__init__()
        self.enorm, self.hnorm = nn.RMSNorm(WIDTH), nn.RMSNorm(WIDTH)
        self.eh_proj = nn.Linear(2 * WIDTH, WIDTH, bias=False)
        self.residual = residual

    def forward(self, hidden, embedded):
        hidden = self.hnorm(hidden)
        mixed = self.eh_proj(torch.cat([self.enorm(embedded), hidden], dim=-1))
        return mixed + hidden if self.residual else mixed


def next_token(residual):
    model = NextToken(residual).double()
    randomize_(model, 0)
    generator = torch.Generator().manual_seed(0)
    shape = (2, 7, WIDTH)
    names = ("hidden", "embedded")
    return model, {n: torch.randn(shape, generator=generator).double() for n in names}


def spans(plan):
    return {s.path: [c.spans for c in s.consumers] for s in plan.sites if s.gain_state == "folded"}


def test_gotcha_22_two_norms_side_by_side_take_their_own_columns():
    model, inputs = next_token(residual=False)
    before = outputs(model, inputs)
    plan = flashnorm.folding(flashnorm.fold_(model, inputs))
    assert spans(plan) == {
        "enorm": [(flashnorm.Span(0, 0, WIDTH),)],
        "hnorm": [(flashnorm.Span(WIDTH, 0, WIDTH),)],
    }
    assert error(outputs(model, inputs), before) < EXACT


def test_gotcha_22_one_norm_folds_where_the_one_beside_it_cannot():
    model, inputs = next_token(residual=True)
    before, weight = outputs(model, inputs), model.eh_proj.weight.detach().clone()
    plan = flashnorm.folding(flashnorm.fold_(model, inputs))
    assert spans(plan) == {"enorm": [(flashnorm.Span(0, 0, WIDTH),)]}
    assert torch.equal(model.eh_proj.weight[:, WIDTH:], weight[:, WIDTH:])
    assert not torch.equal(model.eh_proj.weight[:, :WIDTH], weight[:, :WIDTH])
    assert error(outputs(model, inputs), before) < EXACT


RMS_WRITERS = r"embed_tokens\.weight|o_proj\.weight|down_proj\.weight"
LAYER_WRITERS = r"embed_in\.weight|attention\.dense\.(weight|bias)|dense_4h_to_h\.(weight|bias)"


def test_gotcha_27_centering_is_exact_on_layernorm_and_wrong_on_rmsnorm():
    assert error_of_centering("gpt_neox", LAYER_WRITERS) < EXACT
    assert error_of_centering("llama", RMS_WRITERS) > LARGE


@pytest.mark.parametrize(
    "name", ["llama", "gemma2", "mixtral", "olmo2", "qwen3_next", "olmo_hybrid", "mamba2"]
)
def test_gotcha_27_a_model_with_rmsnorm_is_never_centered(name):
    plan, change = fold_and_center(name)
    assert {site.kind for site in plan.sites} == {"rms"}
    assert plan.folded
    assert not plan.centerings
    assert not centered(plan, "rms")
    assert change < EXACT


def test_gotcha_27_a_model_with_layernorm_is_centered():
    plan, change = fold_and_center("gpt_neox")
    assert centered(plan, "layer") == [site.path for site in plan.sites]
    assert {c.parameter for c in plan.centerings} == {
        name
        for name, _ in tiny_model("gpt_neox").named_parameters()
        if re.search(LAYER_WRITERS, name)
    }
    assert change < EXACT


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_gotcha_28_in_half_precision_only_distances_to_the_truth_compare(name):
    """Llama multiplies by the gain after the cast to bfloat16, Gemma before it."""
    model = tiny_model(name).to(torch.bfloat16)
    folded = copy.deepcopy(model)
    assert flashnorm.folding(flashnorm.fold_(folded)).folded
    inputs = tiny_inputs(model)
    with torch.no_grad():
        assert not torch.equal(folded(**inputs).logits, model(**inputs).logits)
    report = flashnorm.verify(model, folded, tokens=300, sample=256)
    assert report.half_dtype == "bfloat16"
    assert report.half.ratio_lower_bound <= HALF_RATIO
    assert report.half.candidate.rms <= 1.2 * report.half.reference.rms
    assert report.ok, str(report)
