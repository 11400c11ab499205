"""Models in the states that people leave them in: half precision, offloaded, half folded."""

import copy
import json

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, GemmaConfig, GPT2Config, LlamaConfig

import flashnorm
from flashnorm.marker import MARKERS
from flashnorm.planner import cancelling
from flashnorm.rewrite import apply_plan_
from flashnorm.undo import UNDO
from flashnorm.verification.precision import float64_truth
from tests.errors import relative, rounding
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
UNIT = torch.finfo(torch.float64).eps
# Seven matrices and two norms in each of two layers, the last norm and the head.
EXACT = rounding(48, 20)
IDS = torch.arange(12).view(2, 6)


def llama(*, tied=False, dtype=torch.float64, seed=0, config=LlamaConfig):
    model = AutoModelForCausalLM.from_config(config(**SHAPE, tie_word_embeddings=tied)).eval()
    randomize_(model, seed)
    return model.to(dtype)


def gpt2(seed=0):
    config = GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=67, tie_word_embeddings=False)
    model = AutoModelForCausalLM.from_config(config).eval()
    randomize_(model, seed)
    return model.double()


@torch.no_grad()
def logits(model):
    with float64_truth():
        return model(IDS).logits.double()


def held(model):
    """Everything that a fold may touch, by identity and by value."""
    things = {}
    for path, module in model.named_modules(remove_duplicate=False):
        things[path] = (id(module), module.training, tuple(vars(module)))
        for name in ("_forward_hooks", "_forward_pre_hooks"):
            things[path, name] = tuple(getattr(module, name))
        for name, parameter in module._parameters.items():
            value = None if parameter is None else parameter.detach().clone()
            place = None if parameter is None else (id(parameter), parameter.data_ptr())
            things[path, name] = (place, value)
    config = {key: copy.deepcopy(value) for key, value in vars(model.config).items()}
    things["config"] = (id(model.config), json.dumps(config, default=str))
    return things


def equal(one, other):
    if one.keys() != other.keys():
        return False
    for key, value in one.items():
        first, second = value, other[key]
        if isinstance(first, tuple) and first and isinstance(first[-1], torch.Tensor):
            if first[0] != second[0] or not torch.equal(first[1], second[1]):
                return False
        elif first != second:
            return False
    return True


class Failing(TorchDispatchMode):
    """Raises at one operation; without one it counts them."""

    def __init__(self, at=None, error=RuntimeError):
        super().__init__()
        self.at, self.error, self.count = at, error, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += 1
        if self.count == self.at:
            raise self.error("injected")
        return func(*args, **kwargs or {})


FOLDS = {
    "plain": (llama, {}),
    "one_plus": (lambda: llama(config=GemmaConfig), {}),
    "untie": (lambda: llama(tied=True), {"untie": True}),
    "biases": (gpt2, {}),
    "center": (gpt2, {"center": True}),
    "cancel": (llama, {"cancel": True}),
}


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("kind", FOLDS)
def test_field_a_failure_while_folding_leaves_the_model_as_it_was(kind, error):
    make, options = FOLDS[kind]
    plan = flashnorm.inspect(make(), untie="untie" in options, center="center" in options)
    plan = cancelling(plan) if "cancel" in options else plan
    apply_plan_(make(), plan)  # what is computed once is computed now
    model = make()
    with Failing() as counted:
        apply_plan_(model, plan)
    assert counted.count > 30
    model = make()
    before = held(model)
    for at in {*range(1, counted.count + 1, max(1, counted.count // 40)), counted.count}:
        with pytest.raises(error, match="injected"), Failing(at, error):
            apply_plan_(model, plan)
        assert equal(held(model), before), at
    expected = logits(model)
    apply_plan_(model, plan)
    assert relative(logits(model), expected) < EXACT


@pytest.mark.parametrize("kind", FOLDS)
def test_field_a_failure_while_unfolding_leaves_the_model_folded(kind):
    make, options = FOLDS[kind]
    model = make()
    original, expected = held(model), logits(model)
    flashnorm.fold_(model, **options)
    folded = held(model)
    twin = copy.deepcopy(model)
    with Failing() as counted:
        flashnorm.unfold_(twin)
    for at in {*range(1, counted.count + 1, max(1, counted.count // 25)), counted.count}:
        with pytest.raises(KeyboardInterrupt, match="injected"), Failing(at, KeyboardInterrupt):
            flashnorm.unfold_(model)
        assert equal(held(model), folded), at
    flashnorm.unfold_(model)
    assert relative(logits(model), expected) < EXACT
    after = held(model)
    assert after["config"] == original["config"]
    for key, value in original.items():
        if isinstance(key, str) and key != "config":
            assert after[key] == value


def test_field_a_config_that_cannot_be_marked_does_not_spoil_the_fold():
    class Frozen(dict):
        def __setattr__(self, name, value):
            raise TypeError("frozen")

    for config in ({"width": 32}, Frozen(width=32)):
        model = nn.Sequential(nn.RMSNorm(32), nn.Linear(32, 8)).double()
        randomize_(model, 0)
        model.config = config
        x = torch.randn(3, 32, dtype=torch.float64)
        expected = model(x).detach()
        assert flashnorm.folding(flashnorm.fold_(model, (x,))).folded
        assert relative(model(x).detach(), expected) < EXACT
        flashnorm.unfold_(model)
        assert UNDO not in vars(model)
        assert model.config == {"width": 32}


def test_field_unfold_refuses_weights_that_are_not_the_folded_ones():
    model = llama()
    original = {key: value.clone() for key, value in model.state_dict().items()}
    flashnorm.fold_(model)
    folded = {key: value.clone() for key, value in model.state_dict().items()}
    head = {"lm_head.weight": original["lm_head.weight"]}
    for changed in (original, head, {"model.norm.weight": original["model.norm.weight"]}):
        model.load_state_dict(changed, strict=False)
        before = {key: value.clone() for key, value in model.state_dict().items()}
        with pytest.raises(flashnorm.FoldError, match=r"has other values .* than fold_ left"):
            flashnorm.unfold_(model)
        assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
        model.load_state_dict(folded)
    flashnorm.unfold_(model)
    assert all(relative(v, original[k]) <= 2 * UNIT for k, v in model.state_dict().items())


def test_field_unfold_sees_one_replaced_row_and_one_replaced_column():
    for index in ((7, slice(None)), (slice(None), 5)):
        model = llama()
        flashnorm.fold_(model)
        with torch.no_grad():
            model.lm_head.weight[index] += 1.0
        with pytest.raises(flashnorm.FoldError, match=r"lm_head\.weight has other values"):
            flashnorm.unfold_(model)


@pytest.mark.parametrize("options", [{}, {"center": True}])
def test_field_a_model_that_was_moved_unfolds(options):
    model = gpt2()
    expected = logits(model)
    flashnorm.fold_(model, **options)
    model.float()
    flashnorm.unfold_(model)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    # Rounded to float32 once, then again by each of 2 layers of width 32 with some 10 operations.
    assert relative(logits(model), expected) < 2**-23 * 32 * 20


def test_field_unfold_refuses_wrapped_modules_and_can_be_called_again():
    model = gpt2()
    expected = logits(model)
    flashnorm.fold_(model, center=True)
    block, norm = model.transformer.h[0], model.transformer.h[0].ln_1
    block.ln_1 = nn.Sequential(norm)
    with pytest.raises(flashnorm.FoldError, match=r"ln_1 that fold_ put .* replaced or wrapped"):
        flashnorm.unfold_(model)
    block.ln_1 = norm
    norm.forward = type(norm)(1).forward
    with pytest.raises(flashnorm.FoldError, match=r"ln_1 .* was given another forward"):
        flashnorm.unfold_(model)
    del norm.forward
    called = []
    norm.register_forward_hook(lambda *_: called.append(1))
    flashnorm.unfold_(model)
    logits(model)
    assert called, "a hook that was put on the norm of a fold is on the old norm as well"
    assert relative(logits(model), expected) < EXACT
    assert not any(hasattr(model.config, key) for key in MARKERS)


def test_field_unfold_refuses_a_wrapped_reader():
    model = llama()
    flashnorm.fold_(model)
    head = model.lm_head
    model.lm_head = nn.Sequential(head)
    with pytest.raises(flashnorm.FoldError, match=r"lm_head\.weight is no parameter"):
        flashnorm.unfold_(model)
    model.lm_head = head
    flashnorm.unfold_(model)


def test_field_unfold_refuses_a_model_that_runs_without_its_gains():
    model = llama(dtype=torch.float32)
    flashnorm.accelerate_(model, fold=True)
    with pytest.raises(flashnorm.FoldError, match=r"is accelerated.*restore_ it first"):
        flashnorm.unfold_(model)
    flashnorm.restore_(model)
    assert UNDO not in vars(model)
