"""Where the scale of every norm ends (E4, E7, E8, E12): cancelled exactly, or why not."""

import copy
import re

import pytest
import torch

import flashnorm
from flashnorm.plan import Cancelling, Plan
from flashnorm.planner import cancelling
from flashnorm.rewrite import apply_plan_
from tests.zoo.fold import outputs as true_outputs
from tests.zoo.fold import relative as true_relative
from tests.zoo.fold import specimen

from . import adversarial_scales as modules
from .adversarial import K, N
from .test_adversarial import BOUND, inputs_of, made, outputs, relative

EXACT = 1e-12
EXPECTED = {
    modules.Base: ("cancelled", ""),
    modules.Heads: ("cancelled", ""),
    modules.Chain: ("cancelled", ""),
    modules.TwoNormsMet: ("kept", "also read by add"),
    modules.LayerFirst: ("deferred", "mean has to be subtracted first"),
    modules.NormWithBias: ("kept", "adds a bias after its scale"),
    modules.Relu: ("cancelled", ""),
    modules.Gelu: ("deferred", "read by gelu"),
    modules.ReaderWithBias: ("deferred", "its bias is added after the scale"),
    modules.ReadBeside: ("deferred", "read by add"),
    modules.NormReadBeside: ("kept", "also read by add"),
    modules.OtherRows: ("deferred", "beside other values"),
    modules.Joined: ("deferred", "beside other values"),
    modules.Summed: ("deferred", "read by add"),
    modules.Shifted: ("deferred", "read by roll"),
    modules.Reversed: ("deferred", "in another order"),
    modules.Partly: ("partial", "read by _softmax"),
    modules.LatentReadInPart: ("partial", "read by _softmax"),
    modules.PartlyWithoutModule: ("deferred", "returns it|read by"),
    modules.SharedInner: ("deferred", "not a module of its own"),
    modules.InnerReadsRaw: ("deferred", "not a module of its own"),
    modules.Square: ("deferred", "beside other values"),
    modules.QueryKeyOnly: ("deferred", "read by bmm"),
    modules.Glu: ("deferred", "read by silu"),
    modules.ReGlu: ("deferred", ""),
    modules.GluWithBias: ("deferred", "read by"),
}
CANCELS = ("cancelled", "partial")


def first(plan):
    return next(site for site in plan.sites if site.path == "norm")


@pytest.mark.parametrize("cls", EXPECTED, ids=lambda cls: cls.__name__)
def test_scale_ends_where_it_may(cls):
    model, inputs = made(cls), inputs_of(cls)
    before = outputs(model, inputs)
    plan = flashnorm.folding(flashnorm.fold_(model, inputs, cancel=True))
    state, reason = EXPECTED[cls]
    assert first(plan).scale == state, first(plan).scale_reason
    assert re.search(reason, first(plan).scale_reason), first(plan).scale_reason
    swapped = isinstance(model.norm, flashnorm.nn.FlashLinkedRMSNorm)
    assert swapped == (state in CANCELS)
    assert relative(outputs(model, inputs), before) <= BOUND
    flashnorm.unfold_(model)
    assert type(model.norm) is type(cls().norm)
    assert relative(outputs(model, inputs), before) <= BOUND


# These would cancel but for epsilon, which the second norm could not divide by the right s².
BY_EPSILON = (
    modules.Shifted,
    modules.Reversed,
    modules.SharedInner,
    modules.InnerReadsRaw,
    modules.Square,
)
FORCED = [c for c, (s, _) in EXPECTED.items() if s not in CANCELS and hasattr(made(c), "inner")]


@pytest.mark.parametrize("cls", FORCED, ids=lambda cls: cls.__name__)
def test_a_scale_left_out_in_spite_of_the_reason_is_missed(cls):
    """Epsilons too small to matter, mostly: what differs is the scale itself."""
    model, inputs = made(cls), inputs_of(cls)
    for norm in (m for m in model.modules() if isinstance(m, modules.BigEps)):
        norm.eps = norm.eps if cls in BY_EPSILON else 1e-12
    before = outputs(model, inputs)
    gain = model.norm.weight
    model.norm = torch.nn.Identity()
    model.norm.forward = lambda x: x * gain
    assert relative(outputs(model, inputs), before) > 1e-3


@pytest.mark.parametrize("cls", [modules.Base, modules.Heads, modules.Partly])
def test_ignoring_epsilon_is_the_papers_form_and_differs(cls):
    model, inputs = made(cls), inputs_of(cls)
    before = outputs(model, inputs)
    flashnorm.fold_(model, inputs, cancel=True, epsilon="ignore")
    assert isinstance(model.inner, modules.BigEps)
    assert relative(outputs(model, inputs), before) > 1e-3


@pytest.mark.parametrize("epsilon", ["exact", "ignore"])
@pytest.mark.parametrize("cls", [modules.Base, modules.Partly])
def test_a_plan_alone_says_what_is_cancelled_and_how(cls, epsilon):
    model, inputs = made(cls), inputs_of(cls)
    folded = copy.deepcopy(model)
    said = flashnorm.folding(flashnorm.fold_(folded, inputs, cancel=True, epsilon=epsilon))
    assert said.cancellings[0] == Cancelling("norm", epsilon)
    plan = cancelling(flashnorm.inspect(model, inputs), epsilon)
    assert plan == said
    apply_plan_(model, Plan.from_json(plan.to_json()))
    assert isinstance(model.norm, flashnorm.nn.FlashLinkedRMSNorm)
    for mine, theirs in zip(outputs(model, inputs), outputs(folded, inputs), strict=True):
        assert torch.equal(mine, theirs)


def test_a_plan_without_cancellings_cancels_nothing():
    model, inputs = made(modules.Base), inputs_of(modules.Base)
    plan = flashnorm.folding(flashnorm.fold_(model, inputs))
    assert cancelled(plan)
    assert not plan.cancellings
    assert not any(isinstance(m, flashnorm.nn.FlashLinkedRMSNorm) for m in model.modules())


@pytest.mark.parametrize(
    ("cls", "multiplies"),
    # One per feature that gets the scale: K for the gate, and once for what waits for the end.
    [(modules.Glu, K + N), (modules.ReGlu, N), (modules.WideReGlu, 3 * K), (modules.Base, 0)],
)
def test_the_price_of_deferral_is_counted_once_per_feature(cls, multiplies):
    site = first(flashnorm.inspect(made(cls), inputs_of(cls)))
    assert site.saved_multiplies == N - multiplies


def test_a_centered_layer_norm_cancels_like_any_other():
    model, inputs = made(modules.LayerFirst), inputs_of(modules.LayerFirst)
    before, keys = outputs(model, inputs), set(model.state_dict())
    plan = flashnorm.folding(flashnorm.fold_(model, inputs, center=True, cancel=True))
    assert (first(plan).centering, first(plan).scale) == ("folded", "cancelled")
    assert relative(outputs(model, inputs), before) <= BOUND
    assert set(model.state_dict()) == keys
    flashnorm.unfold_(model)
    assert relative(outputs(model, inputs), before) <= BOUND


def test_glu_halves_wait_for_the_second_product():
    site = first(flashnorm.inspect(made(modules.Glu), inputs_of(modules.Glu)))
    places = {reader.path: (reader.place, reader.after) for reader in site.readers}
    assert places == {"gate": ("output", ""), "up": ("later", "down.weight")}
    site = first(flashnorm.inspect(made(modules.ReGlu), inputs_of(modules.ReGlu)))
    assert {(r.place, r.after) for r in site.readers} == {("later", "down.weight")}


def test_a_cancelled_model_can_be_copied_and_used_by_threads():
    from concurrent.futures import ThreadPoolExecutor

    model, (x,) = made(modules.Heads), inputs_of(modules.Heads)
    batches = [x * factor for factor in (0.1, 1.0, 3.0, 10.0)] * 8
    with torch.no_grad():
        expected = [model(batch) for batch in batches]
        flashnorm.fold_(model, (x,), cancel=True)
        other = copy.deepcopy(model)
        assert other.norm.row_scale is other.inner.undoes is not model.norm.row_scale
        with ThreadPoolExecutor(4) as pool:
            found = list(pool.map(other, batches))
    for mine, theirs in zip(found, expected, strict=True):
        assert relative(mine, theirs) <= BOUND


@pytest.mark.parametrize("which", ["norm", "inner"])
def test_a_norm_with_other_parameters_keeps_the_scale(which):
    """None of ours could hold them, whether its scale goes or it undoes another's."""
    model, inputs = made(modules.Base), inputs_of(modules.Base)
    assert cancelled(flashnorm.inspect(model, inputs))
    model.get_submodule(which).register_parameter("extra", torch.nn.Parameter(torch.ones(5)))
    before = outputs(model, inputs)
    plan = flashnorm.folding(flashnorm.fold_(model, inputs, cancel=True))
    assert not cancelled(plan)
    assert relative(outputs(model, inputs), before) <= BOUND


def test_an_unknown_mode_is_refused():
    with pytest.raises(ValueError, match=r'epsilon must be "exact" or "ignore", not \'about\''):
        flashnorm.fold_(made(modules.Base), inputs_of(modules.Base), cancel=True, epsilon="about")


FULL = ["gemma4_text", "gemma4_unified_text"]
PARTIAL = ["deepseek_v2", "deepseek_v3", "deepseek_v32", "hy_v4", "minicpm3"]
NEVER = ["gemma3n_text", "gemma3_text", "llama", "gemma2", "qwen3"]


def cancelled(plan):
    return {site.scale for site in plan.sites} & set(CANCELS)


@pytest.mark.parametrize("name", FULL + PARTIAL)
def test_types_whose_norms_are_undone(name):
    model, inputs = specimen(name)
    step = {**inputs, "input_ids": inputs["input_ids"][:, :1]}
    before, whole = true_outputs(model, inputs), greedy(model, step)
    keys = set(model.state_dict())
    plan = flashnorm.folding(flashnorm.fold_(model, copy.deepcopy(inputs), cancel=True))
    assert cancelled(plan) == {"cancelled" if name in FULL else "partial"}
    assert true_relative(true_outputs(model, inputs), before) <= EXACT
    assert torch.equal(greedy(model, step), whole)
    assert set(model.state_dict()) == keys
    flashnorm.unfold_(model)
    assert true_relative(true_outputs(model, inputs), before) <= EXACT


def greedy(model, inputs):
    """Five tokens through the cache, in float64."""
    with torch.no_grad():
        return model.generate(
            inputs["input_ids"], max_new_tokens=5, do_sample=False, pad_token_id=0
        )


@pytest.mark.parametrize("name", NEVER)
def test_types_whose_norms_are_not_undone(name):
    model, inputs = specimen(name)
    plan = flashnorm.inspect(model, copy.deepcopy(inputs))
    assert not cancelled(plan)
    assert all(site.scale_reason or site.scale == "deferred" for site in plan.sites)


@pytest.mark.parametrize("name", FULL + PARTIAL)
def test_the_error_of_the_papers_form_is_that_of_epsilon(name):
    """RMS of order one and ε of 1e-6: ignoring it costs about as much, and not nothing."""
    model, inputs = specimen(name)
    before = true_outputs(model, inputs)
    flashnorm.fold_(model, copy.deepcopy(inputs), cancel=True, epsilon="ignore")
    assert 1e-10 < true_relative(true_outputs(model, inputs), before) < 1e-4
