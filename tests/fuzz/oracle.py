"""One random model against its untouched copy in float64: folded, unfolded, accelerated, forced."""

from __future__ import annotations

import copy
import re
from collections import Counter
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from random import Random
from typing import Any

import torch
from torch import Tensor, nn

import flashnorm
from flashnorm.kernels.cpu import calls as cpu
from flashnorm.plan import Plan, Site
from flashnorm.planner import NO_GAIN, cancelling
from flashnorm.rewrite import apply_plan_
from flashnorm.verification.bounds import Size, output_bound, owns_matrix, width_of
from flashnorm.verification.precision import float64_truth
from tests.errors import nudged
from tests.forcing import forced_plans
from tests.fuzz.program import Program, Written, build, inputs_of
from tests.zoo.fold import relative

# What rounding explains in float64, with gains near zero divided out again.
EXACT = 1e-10
# Shapes [batch, tokens]: the first is recorded, the others are not. `blind` models have one length.
RECORDED = (2, 4)
SHAPES = (RECORDED, (3, 7), (1, 2))
BLIND = (RECORDED, (3, 4), (1, 4))

Outputs = list[Tensor]


@dataclass(frozen=True)
class Options:
    """What is done with a model; drawn from its seed."""

    untie: bool = False
    center: bool = False
    cancel: bool = False
    accelerate: bool = False
    force: bool = False
    fail: bool = False

    @staticmethod
    def of(seed: int) -> Options:
        rng = Random(f"options {seed}")
        chances = {"untie": 0.4, "center": 0.45, "cancel": 0.4}
        chances |= {"accelerate": 0.2, "force": 0.3, "fail": 0.05}
        return Options(**{name: rng.random() < chance for name, chance in chances.items()})


@dataclass
class Verdict:
    """What became of one model. `wrong` says what is silently wrong, empty where nothing is."""

    seed: int
    wrong: str = ""
    detail: str = ""
    invalid: bool = False
    untraced: bool = False
    norms: int = 0
    missed: list[str] = field(default_factory=list)
    sites: int = 0
    folded: int = 0
    weightless: int = 0
    refused: Counter[str] = field(default_factory=Counter)
    forced: int = 0
    needless: list[str] = field(default_factory=list)
    fused: int = 0


class _Wrong(Exception):
    """A counterexample: what kind, and the details."""


def judge(program: Program | Written, seed: int, options: Options) -> Verdict:
    """Everything that must hold of one model."""
    torch.manual_seed(seed)
    try:
        case = _Case(program, seed)
    except _Invalid:
        return Verdict(seed, invalid=True)
    verdict = Verdict(seed, norms=len(program.norms))
    try:
        _judge(case, options, verdict)
    except _Wrong as wrong:
        verdict.wrong, verdict.detail = wrong.args
    except _Invalid:
        verdict.invalid = True
    except flashnorm.TraceError:
        verdict.untraced = True  # refused as a whole, by a name
        verdict.missed = [norm.text for norm in program.norms]
    except Exception as error:
        verdict.wrong = f"crash: {type(error).__name__}"
        verdict.detail = f"{type(error).__name__}: {error}"
    return verdict


class _Invalid(Exception):
    """The model does not run, or its numbers are of no use."""


class _Case:
    """A model, its inputs, and what it must give."""

    def __init__(self, program: Program | Written, seed: int) -> None:
        self.program, self.seed = program, seed
        shapes = BLIND if program.blind else SHAPES
        self.inputs = [inputs_of(program, seed + i, *shape) for i, shape in enumerate(shapes)]
        self.wide = ".float()" in program.source or ".to(" in program.source
        try:
            self.model = build(program, seed)
            self.truth = self.outputs(self.model)
            _run(self.model, self.inputs[0])  # as it is recorded: with its own casts
        except Exception as error:
            raise _Invalid from error
        flat = [t for outputs in self.truth for t in outputs]
        if not all(bool(t.isfinite().all()) and 1e-4 < t.abs().max() < 1e8 for t in flat):
            raise _Invalid

    def outputs(self, model: nn.Module) -> list[Outputs]:
        return [self.outputs_on(model, inputs) for inputs in self.inputs]

    def outputs_on(self, model: nn.Module, inputs: Sequence[Tensor]) -> Outputs:
        given = [tensor.clone() for tensor in inputs]
        with torch.no_grad(), float64_truth() if self.wide else nullcontext():
            out = model(*given)
        return [t.detach().clone() for t in (out if isinstance(out, tuple) else (out,))]

    def example(self) -> tuple[Tensor, ...]:
        return tuple(tensor.clone() for tensor in self.inputs[0])

    def error(self, model: nn.Module) -> float:
        try:
            found = self.outputs(model)
        except Exception as error:
            raise _Wrong("the forward raises", f"{type(error).__name__}: {error}") from error
        return max(map(relative, found, self.truth))


def _judge(case: _Case, options: Options, verdict: Verdict) -> None:
    model = case.model
    before = _state(model)
    if options.fail:
        _fails(case, model, before)
    try:
        plan = flashnorm.inspect(model, case.example(), untie=options.untie, center=options.center)
    finally:
        _same_bits(model, before, "inspect changed the model")
    _count(case.program, plan, verdict)
    folded = copy.deepcopy(model)
    kept = _state(folded)
    apply_plan_(folded, cancelling(plan) if options.cancel else plan)
    if not case.error(folded) <= EXACT:
        if not case.error(nudged(model)) <= EXACT:
            raise _Invalid  # rounding decides: a comparison with what is zero but for it
        raise _Wrong("fold_", f"off by {case.error(folded):.2e} {_said(options)}\n{plan}")
    if "_flashnorm_undo" in folded.__dict__:
        flashnorm.unfold_(folded)
        _restored(case, folded, kept, plan)
    if options.accelerate:
        _accelerated(case, verdict)
    if options.force:
        _forced(case, plan, verdict)


def _said(options: Options) -> str:
    return ", ".join(f"{k}" for k in ("untie", "center", "cancel") if getattr(options, k))


def _state(model: nn.Module) -> dict[str, tuple[int, Tensor]]:
    tensors = (*model.named_parameters(remove_duplicate=False), *model.named_buffers())
    return {name: (id(tensor), tensor.detach().clone()) for name, tensor in tensors}


def _same_bits(model: nn.Module, before: dict[str, tuple[int, Tensor]], what: str) -> None:
    after = _state(model)
    same = before.keys() == after.keys() and all(
        before[name][0] == after[name][0] and torch.equal(before[name][1], after[name][1])
        for name in before
    )
    if not same:
        raise _Wrong(what, "")


def _fails(case: _Case, model: nn.Module, before: dict[str, tuple[int, Tensor]]) -> None:
    """A call that cannot succeed leaves the model as it was."""
    wrong = tuple(t.new_zeros(2, 4, 5) if t.is_floating_point() else t + 99 for t in case.inputs[0])
    try:
        flashnorm.fold_(model, wrong)
    except flashnorm.FlashNormError:
        _same_bits(model, before, "a failing call changed the model")
    except Exception as error:
        raise _Wrong("a failing call raised something else", repr(error)) from error
    else:
        raise _Invalid  # it takes other inputs as well


def _restored(
    case: _Case, model: nn.Module, before: dict[str, tuple[int, Tensor]], plan: Plan
) -> None:
    after = _state(model)
    if before.keys() != after.keys():
        raise _Wrong("unfold_", f"other tensors: {sorted(before.keys() ^ after.keys())}")
    for name, (_, tensor) in before.items():
        scale = tensor.abs().max() if tensor.numel() else 1
        if not (after[name][1] - tensor).abs().max() <= 1e-12 * scale:
            raise _Wrong("unfold_", f"{name} is not what it was\n{plan}")
    if not case.error(model) <= EXACT:
        raise _Wrong("unfold_", f"off by {case.error(model):.2e}\n{plan}")


def _accelerated(case: _Case, verdict: Verdict) -> None:
    if not cpu.available()[0]:
        return
    model = copy.deepcopy(case.model).float()
    before = _state(model)
    inputs = [[_narrow(t) for t in given] for given in case.inputs]
    own = [_run(model, given) for given in inputs]
    noisy = [_run(nudged(model), given) for given in inputs]
    flashnorm.accelerate_(model, tuple(t.clone() for t in inputs[0]), huge_pages=False)
    verdict.fused = len(flashnorm.acceleration(model).fused)
    _same_bits(model, before, "accelerate_ changed a tensor")
    depth = sum(owns_matrix(module) for module in model.modules()) + len(case.program.statements)
    size = Size(width_of(model), depth, torch.float32)
    for given, expected, other, truth in zip(inputs, own, noisy, case.truth, strict=True):
        noise = max(relative(other, expected), relative(expected, truth))
        bound = max(output_bound(size, torch.float32), 20 * noise)
        for time in ("first", "second"):
            error = relative(_run(model, given), expected)
            if not error <= bound:
                said = flashnorm.acceleration(model)
                raise _Wrong("accelerate_", f"{error:.2e} > {bound:.2e} at the {time} call\n{said}")
    flashnorm.restore_(model)
    _same_bits(model, before, "restore_ changed a tensor")
    if any("forward" in module.__dict__ for module in model.modules()):
        raise _Wrong("restore_", "a forward of ours is left")


def _narrow(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.is_floating_point() else tensor


def _run(model: nn.Module, inputs: Sequence[Tensor]) -> Outputs:
    with torch.no_grad():
        out = model(*(tensor.clone() for tensor in inputs))
    return [t.double() for t in (out if isinstance(out, tuple) else (out,))]


def _forced(case: _Case, plan: Plan, verdict: Verdict) -> None:
    """Fold every refused gain all the same, alone: the outputs must change."""
    for gain, forced in forced_plans(case.model, case.example()).items():
        model = copy.deepcopy(case.model)
        try:
            apply_plan_(model, replace(forced, sites=tuple(map(_carried, forced.sites))))
            changed = not max(map(relative, case.outputs(model), case.truth)) <= EXACT
        except Exception:  # it cannot be folded at all
            changed = True
        verdict.forced += 1
        if not changed:
            reasons = [s.reason for s in plan.sites if s.gain and s.gain.parameter == gain]
            verdict.needless += [worded(reason) for reason in reasons[:1]]


def _carried(site: Site) -> Site:
    """The bias stays with the norm as β/g, as it would if the gain folded."""
    return replace(site, bias="carried") if site.norm_bias else site


def _count(program: Program | Written, plan: Plan, verdict: Verdict) -> None:
    verdict.sites = len(plan.sites)
    named = {site.gain.parameter: site for site in plan.sites if site.gain}
    nameless = Counter(site.path for site in plan.sites if site.gain is None)
    seen = set()
    for norm in program.norms:
        if norm.gain and norm.gain in named:
            site = named[norm.gain]
            if norm.gain in seen:
                verdict.norms -= 1
                continue
            seen.add(norm.gain)
            verdict.folded += site.gain_state == "folded"
            verdict.refused[worded(site.reason)] += site.gain_state == "kept"
        elif nameless[norm.path] > 0:
            nameless[norm.path] -= 1
            site = next(s for s in plan.sites if s.path == norm.path and s.gain is None)
            verdict.weightless += not norm.gain
            if norm.gain and site.reason == NO_GAIN:
                verdict.missed.append("\n".join(norm.lines()))
            elif norm.gain:
                verdict.refused[worded(site.reason)] += 1
        else:
            verdict.missed.append("\n".join(norm.lines()))
    verdict.refused += Counter()


_QUOTED = re.compile(r"'[^']*'|\b[\w.]+\.\w+(:\d+)?\b|\b(?:weight|bias|[a-z])\d+\b|\d+")


def worded(reason: str) -> str:
    """A reason without the names in it."""
    return re.sub(r"(…[,\s]*)+", "… ", _QUOTED.sub("…", reason)).strip()[:110]


def verdict_fields(verdict: Verdict) -> dict[str, Any]:
    return dict(vars(verdict))
