"""fold_ and unfold_ on live models, and the plan on disk giving the very same bits."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, GemmaConfig, LlamaConfig

import flashnorm
from flashnorm.marker import MARKERS
from tests.zoo import randomize_

SHAPE = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": 67,
}
CONFIGS = {"plain": LlamaConfig, "one_plus": GemmaConfig}


def tiny(kind="plain", *, tied=False, dtype=torch.float32, seed=0):
    config = CONFIGS[kind](**SHAPE, tie_word_embeddings=tied)
    model = AutoModelForCausalLM.from_config(config).eval()
    randomize_(model, seed)
    return model.to(dtype)


def state(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("untie", [False, True])
def test_disk_and_memory_give_the_same_bits(tmp_path, kind, dtype, untie):
    model = tiny(kind, tied=True, dtype=dtype)
    model.save_pretrained(tmp_path / "source", max_shard_size="20KB")
    on_disk = flashnorm.fold_checkpoint(tmp_path / "source", tmp_path / "folded", untie=untie)
    in_memory = flashnorm.folding(flashnorm.fold_(model, untie=untie))
    assert on_disk.sites == in_memory.sites
    assert len(on_disk.folded) == 4 + untie
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "folded", dtype=dtype)
    expected = state(model)
    assert state(loaded).keys() == expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in state(loaded).items())
    model.save_pretrained(tmp_path / "saved")
    saved = load_file(tmp_path / "saved" / "model.safetensors")
    assert all(torch.equal(value, expected[name]) for name, value in saved.items())


def test_folded_gains_are_exactly_one():
    model = tiny()
    plan = flashnorm.folding(flashnorm.fold_(model))
    parameters = dict(model.named_parameters())
    assert len(plan.folded) == len(plan.sites) == 5
    assert all((parameters[g.parameter] == 1).all() for g in plan.gains())


@given(seed=st.integers(0, 1000), kind=st.sampled_from(sorted(CONFIGS)))
@settings(max_examples=12, deadline=None)
def test_unfold_gives_the_weights_back_within_one_rounding(seed, kind):
    model = tiny(kind, seed=seed)
    before = state(model)
    flashnorm.fold_(model)
    assert any(not torch.equal(v, before[k]) for k, v in model.state_dict().items())
    flashnorm.unfold_(model)
    # Two roundings of half a unit each: of the product, and of the quotient.
    unit = 2 * torch.finfo(torch.float32).eps
    for name, value in model.state_dict().items():
        assert ((value - before[name]).abs() <= unit * before[name].abs()).all(), name


@given(seed=st.integers(0, 1000), kind=st.sampled_from(sorted(CONFIGS)))
@settings(max_examples=8, deadline=None)
def test_a_second_fold_changes_no_bit(seed, kind):
    model = tiny(kind, seed=seed)
    flashnorm.fold_(model)
    once = state(model)
    first = flashnorm.folding(model)
    flashnorm.fold_(model)
    second = flashnorm.inspect(model)
    assert not second.folded
    assert flashnorm.folding(model) is first
    assert all("one everywhere already" in site.reason for site in second.sites)
    assert all(torch.equal(value, once[name]) for name, value in model.state_dict().items())


def test_a_zero_gain_can_be_undone():
    model = tiny()
    gain = model.get_parameter("model.norm.weight")
    with torch.no_grad():
        gain[3] = 0.0
    before = state(model)
    flashnorm.fold_(model)
    assert (model.get_parameter("lm_head.weight")[:, 3] == 0).all()
    flashnorm.unfold_(model)
    assert torch.equal(model.get_parameter("lm_head.weight")[:, 3], before["lm_head.weight"][:, 3])


def test_an_overflow_leaves_the_model_untouched():
    model = tiny(dtype=torch.float16)
    with torch.no_grad():
        model.get_parameter("lm_head.weight")[5, 3] = 6e4
        model.get_parameter("model.norm.weight")[3] = -284.0
    before = state(model)
    message = r"lm_head\.weight.*model\.norm\.weight.*overflow"
    with pytest.raises(flashnorm.FoldError, match=message):
        flashnorm.fold_(model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_gain_that_is_not_finite_is_refused():
    model = tiny()
    with torch.no_grad():
        model.get_parameter("model.norm.weight")[0] = float("nan")
    with pytest.raises(flashnorm.FoldError, match=r"model\.norm\.weight: the gain holds NaN"):
        flashnorm.fold_(model)


def test_the_config_is_marked_and_unmarked():
    model = tiny(tied=True)
    plan = flashnorm.folding(flashnorm.fold_(model, untie=True))
    assert model.config.flashnorm_folded is True
    assert model.config.flashnorm["folded"] == sorted(g.parameter for g in plan.gains())
    assert model.config.tie_word_embeddings is False
    flashnorm.unfold_(model)
    assert not any(hasattr(model.config, key) for key in MARKERS)
    assert model.config.tie_word_embeddings is True
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_plain_weights_fold_though_the_config_says_quantized():
    """As transformers leaves a model that it dequantized from GGUF while loading."""
    model = tiny()
    model.config.quantization_config = {"quant_method": "gguf"}
    assert len(flashnorm.folding(flashnorm.fold_(model)).folded) == 5


def test_unfold_needs_a_fold():
    with pytest.raises(flashnorm.FoldError, match=r"was not folded by flashnorm\.fold_"):
        flashnorm.unfold_(tiny())


def test_a_model_without_weights_cannot_be_folded():
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(LlamaConfig(**SHAPE))
    with pytest.raises(flashnorm.FoldError, match="is on the meta device; load the weights"):
        flashnorm.fold_(model)


def test_a_module_with_nothing_to_fold_is_a_plan_without_folds():
    model = flashnorm.fold_(torch.nn.Linear(3, 4), torch.randn(2, 3))
    assert flashnorm.folding(model).sites == ()


def test_a_deep_copy_of_a_folded_model_unfolds():
    model = tiny()
    before = state(model)
    flashnorm.fold_(model)
    twin = copy.deepcopy(model)
    flashnorm.unfold_(twin)
    unit = 2 * torch.finfo(torch.float32).eps
    for name, value in twin.state_dict().items():
        assert ((value - before[name]).abs() <= unit * before[name].abs()).all()
