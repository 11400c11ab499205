"""`accelerate_`: a model runs on norm + linear kernels, in place, and can be put back."""

from __future__ import annotations

import logging
import os
from dataclasses import asdict, dataclass, field
from typing import Any, TypeVar

import torch
from torch import nn

from flashnorm.errors import FlashNormError
from flashnorm.graph.fusible import find_fusible
from flashnorm.graph.recording import record
from flashnorm.integrations.transformers_attention import (
    UsedAttention,
    restore_attention_,
    use_attention_,
    why_not,
)
from flashnorm.integrations.transformers_experts import (
    UsedExperts,
    restore_experts_,
    use_experts_,
)
from flashnorm.kernels import dispatch
from flashnorm.kernels.backend import Backend
from flashnorm.kernels.freed import give_back
from flashnorm.paged import Paged
from flashnorm.planner import inspect_module, make_plan
from flashnorm.quantized.layout import Aside, plain, put_back, unpacking
from flashnorm.rewrite import apply_plan_, unfold_
from flashnorm.runtime import growing
from flashnorm.runtime.adjacent import lay_out_, take_apart_
from flashnorm.runtime.build import Builder as Builder
from flashnorm.runtime.build import Part as Part
from flashnorm.runtime.forwards import Fused
from flashnorm.runtime.package.make import packaged
from flashnorm.runtime.package.options import Package
from flashnorm.runtime.stand import Stand, retire
from flashnorm.runtime.steps import Trained
from flashnorm.runtime.summary import summary
from flashnorm.runtime.training import Trainer
from flashnorm.transaction import Transaction

RECORD = "_flashnorm_acceleration"

_log = logging.getLogger("flashnorm")
UNPACKS = (
    "the model unpacks its quantized weights at its first call, and cannot be kept from it: a {} "
    "runs its own code ({}); load the model dequantized instead (its quantization config has "
    "dequantize=True)"
)
Model = TypeVar("Model", bound=nn.Module)


@dataclass(frozen=True)
class Acceleration(Paged, pages="flashnorm.html.accelerated"):
    """What `accelerate_` did with every norm and linear layer of a model, and with its attention.

    `attention` says why the attention of single tokens is the model's own; empty where it is not.
    `training` are the modules that save less for a gradient, and those that cannot; empty where
    that was not asked for. `experts` is like `attention` for the experts of few tokens; None where
    the model has none in one tensor. `package` is where the compiled decode step is, and
    `captures` how decode steps are captured (`capture_`); empty where they are not.
    """

    parts: tuple[Part, ...]
    kernels: str
    attention: str
    folded: bool
    training: tuple[Part, ...] = ()
    experts: str | None = None
    package: str = ""
    captures: str = ""

    @property
    def fused(self) -> tuple[Part, ...]:
        """The parts that run on a kernel."""
        return tuple(part for part in self.parts if not part.reason)

    def to_json(self) -> dict[str, Any]:
        """A JSON-serializable dict."""
        return asdict(self)

    @staticmethod
    def from_json(data: dict[str, Any]) -> Acceleration:
        """What `to_json` wrote."""
        parts = {
            name: tuple(
                Part(**{**part, "precomputed": tuple(part["precomputed"])}) for part in data[name]
            )
            for name in ("parts", "training")
        }
        return Acceleration(**{**data, **parts})

    def __str__(self) -> str:
        """Alike modules in one row, like a plan; `parts` has them one by one."""
        return summary(
            self.parts,
            self.kernels,
            self.attention,
            self.folded,
            self.training,
            self.experts,
            self.package,
            self.captures,
        )


@dataclass
class _Undo:
    forwards: list[tuple[nn.Module, Stand]]
    attention: UsedAttention | str
    experts: UsedExperts | str | None
    acceleration: Acceleration
    moved: list[nn.Parameter]
    alone: list[Fused] = field(default_factory=list)  # what has a kernel in captured steps alone
    # Attributes of the model, beside forwards, that leave with them.
    held: list[tuple[str, Any]] = field(default_factory=list)
    # Hooks of the model that would unpack its weights.
    hooks: list[Aside] = field(default_factory=list)


def accelerate_(
    model: Model,
    example_inputs: Any = None,
    *,
    fold: bool = False,
    training: bool = False,
    huge_pages: bool = True,
    adjacent_weights: bool = False,
    package: str | os.PathLike[str] | Package | None = None,
) -> Model:
    """Let a model run on fused norm + linear kernels, in place; returns the model.

        norm(x)·g Wᵀ = s ⊙ ((x ⊙ g) Wᵀ),   s = rsqrt(mean(x²) + ε)

    Every norm that is a module of its own computes its linear readers in the same call (q, k and v;
    gate, up and activation), every linear layer reads its weight at the speed of memory, and a new
    token attends by a kernel, through transformers' attention interface, where that is sdpa, and
    reads its experts by one, through the interface of experts, where they are in one tensor. With
    that attention a growing cache is appended to in place, on a CPU, instead of being copied. No
    forward is rewritten and no weight is copied or changed: modules get another `forward`,
    parameters, names and state dict stay. Float32, bfloat16 and float16 on a CPU, without
    gradients; for everything else, and in every module that no kernel fits, the model's own code
    runs (`flashnorm.acceleration(model)` says where and why). A model that is on a GPU by now gets
    forwards for it (docs/acceleration.md): kernels in CUDA graphs and under torch.compile. With
    `fold` the gains are folded first (`fold_`), which is needed for nothing but saves loading
    them. With `huge_pages` Linux moves the weights into huge pages, where they are: a few seconds
    per GB, once.

    With `adjacent_weights` those that share x (q, k and v; gate and up) are laid out as views of
    one buffer, so that on a GPU a library multiplies more rows than the kernels take by all of them
    at once. Parameters stay, by identity, name, shape and value, and so does the state dict.

    With `training` a gradient saves less, in every floating dtype and on every device: of a norm x
    and one number per row (LayerNorm: two), of a gated pair the two products; z = norm(x) and
    act(a) ⊙ b are made again where a weight's gradient needs them. Every parameter gets the
    gradient it would have got. Do it before the model is wrapped or sharded (DDP, `fully_shard`).

    With `package`, a directory, the step of one new token is compiled as a whole, once, which takes
    a minute or two; the next time it is found there and loaded in milliseconds. A token then takes
    no Python between kernels, in `generate()` and in loops of forwards, on growing caches and on
    static ones of the package's length. Weights and caches are not copied. It is for one sequence
    of up to 2048 tokens; `Package(directory, length, batch)` says otherwise. Whatever it does not
    fit (a prefill, other batches, longer sequences, hooks, adapters, a gradient, weights that were
    changed in kind) runs as without it. Compiled code is loaded from there: name a directory that
    only you write to.

    `example_inputs` is a dict or tuple for the model's forward, or a list of several, needed for
    modules that are not from transformers. Raises TraceError where the model cannot be recorded,
    FlashNormError where it is accelerated already, or where the decode step cannot be packaged or
    the package used: the model is then as it was. Source: FlashNorm, arXiv 2407.09577.
    """
    if RECORD in model.__dict__:
        raise FlashNormError("this model is accelerated already; restore_ it first")
    options = (fold, training, huge_pages, adjacent_weights, package)
    found = _accelerate(model, example_inputs, *options)
    give_back()  # what the recording took
    _log.info("%d of %d modules run on %s", len(found.fused), len(found.parts), found.kernels)
    return model


def _accelerate(
    model: nn.Module,
    example_inputs: Any,
    fold: bool,
    training: bool,
    huge_pages: bool,
    adjacent_weights: bool,
    package: str | os.PathLike[str] | Package | None,
) -> Acceleration:
    """`accelerate_`: all of it, or an error and none of it."""
    graph = record(model, example_inputs)
    plan = make_plan(graph)
    backend = dispatch.backend_of(*model.parameters())
    available, kernels = backend.available(_device(model, backend))
    with Transaction() as change:
        folded = fold and _fold(model, example_inputs, change)
        builder = Builder(model, find_fusible(graph), backend)
        parts = builder.build(plan.sites) if available else builder.refuse(plan.sites, kernels)
        forwards: dict[nn.Module, Any] = dict(builder.forwards)
        trainer = Trainer(builder)
        trained = trainer.build(plan.sites) if training else []
        for step in trainer.steps.values():
            forwards[step.module] = Trained(step, forwards.get(step.module))
        for module, forward in forwards.items():
            change.item(module.__dict__, "forward", forward)
        for made in builder.made.values():
            made.install()
        moved = _lay_out(builder, change) if adjacent_weights and available else []
        if huge_pages and available:
            kernels_of = [kernel for made in builder.made.values() for kernel in made.kernels()]
            inside = [plain(tensor) for kernel in kernels_of for tensor in kernel.parameters()]
            backend.prepare_memory([*model.parameters(), *inside])
        attention = _attend(model, change)
        experts = _route(model, change)
        reason = attention if isinstance(attention, str) else ""
        left = "" if isinstance(experts, UsedExperts) else experts
        where = "" if package is None else _package(model, package, change, forwards)
        appends = isinstance(attention, UsedAttention) and backend.device == growing.DEVICE
        if appends and "forward" not in model.__dict__:
            forwards[model] = growing.Growing(model)
            change.item(model.__dict__, "forward", forwards[model])
        found = Acceleration(tuple(parts), kernels, reason, folded, tuple(trained), left, where)
        hooks = _keep_packed(model, builder, change)
        alone = builder.alone
        undo = _Undo(list(forwards.items()), attention, experts, found, moved, alone, hooks=hooks)
        change.item(model.__dict__, RECORD, undo)
    return found


def _device(model: nn.Module, backend: Backend) -> torch.device:
    """Where the backend's kernels will run."""
    claimed = (p.device for p in model.parameters() if backend.claims(p))
    return next(claimed, torch.device(backend.device))


def _fold(model: nn.Module, example_inputs: Any, change: Transaction) -> bool:
    """Fold the gains of a model; False where there is nothing to fold."""
    plan = inspect_module(model, example_inputs)
    if plan.folded:
        apply_plan_(model, plan, within=change)
    return bool(plan.folded)


def _lay_out(builder: Builder, change: Transaction) -> list[nn.Parameter]:
    """`lay_out_` for all that one call multiplies, as a part of a transaction."""
    moved: list[nn.Parameter] = []
    change.step(lambda: take_apart_(moved))
    for made in builder.made.values():
        lay_out_(made.kernels(), moved)
    return moved


def _keep_packed(model: nn.Module, builder: Builder, change: Transaction) -> list[Aside]:
    """Set aside the hooks that would unpack weights at the first call.

    Raises FlashNormError where a layer that they unpack has no kernel.
    """
    taken, hooks = {id(module) for module, _ in builder.forwards}, []
    for found in unpacking(model):
        left = [layer for layer in found.layers if id(layer) not in taken]
        if left:
            reason = builder.proven.find(left[0])
            why = reason if isinstance(reason, str) else "no kernel takes its packed weight"
            raise FlashNormError(UNPACKS.format(type(left[0]).__name__, why))
        hooks.append((found.hooks, found.key, found.hooks[found.key]))
    change.step(lambda: put_back(hooks))
    for place, key, _ in hooks:
        del place[key]
    return hooks


def _package(
    model: nn.Module,
    asked: str | os.PathLike[str] | Package,
    change: Transaction,
    forwards: dict[nn.Module, Any],
) -> str:
    """Put the compiled decode step in the place of the model's forward; where it is kept."""
    options = asked if isinstance(asked, Package) else Package(asked)
    forward, place = packaged(model, options)
    forwards[model] = forward
    change.item(model.__dict__, "forward", forward)
    forward.watch()
    return str(place)


def _attend(model: nn.Module, change: Transaction) -> UsedAttention | str:
    """`use_attention_`, as a part of a transaction."""
    if reason := why_not(model):
        return reason
    change.step(lambda: restore_attention_(model, UsedAttention()))
    return use_attention_(model)


def _route(model: nn.Module, change: Transaction) -> UsedExperts | str | None:
    """`use_experts_`, as a part of a transaction."""
    change.step(lambda: restore_experts_(model))
    return use_experts_(model)


def restore_(model: Model) -> Model:
    """Undo `accelerate_`; returns the model.

    Its weights were not touched, so it is the original again, bit for bit; where `fold` was asked
    for, `unfold_` divides the gains out again within one rounding. A forward that somebody put over
    one of ours stays, and ours below it is the module's own from then on. Where a step fails, its
    error is raised and nothing is forgotten: it can be called again. Raises FlashNormError if this
    model object was not accelerated.
    """
    undo: _Undo | None = model.__dict__.get(RECORD)
    if undo is None:
        raise FlashNormError("this model was not accelerated by accelerate_: nothing to restore")
    kept = [module for module, forward in undo.forwards if not _take_away(module, forward)]
    for name, value in undo.held:
        if vars(model).get(name) is value:
            del vars(model)[name]
    if kept:
        names = ", ".join(path or "(root)" for path, m in model.named_modules() if m in kept)
        _log.warning("forwards that were put over those of accelerate_ stay: %s", names)
    if not isinstance(undo.attention, str):
        restore_attention_(model, undo.attention)
    if isinstance(undo.experts, UsedExperts):
        restore_experts_(model)
    take_apart_(undo.moved)
    put_back(undo.hooks)
    undo.hooks = []
    if undo.acceleration.folded:
        unfold_(model)
    del model.__dict__[RECORD]
    return model


def _take_away(module: nn.Module, forward: Stand) -> bool:
    """Take a forward off its module, and the kernels out of it; False where another is over it."""
    found = module.__dict__.get("forward")
    if found is forward:
        del module.__dict__["forward"]
        if (before := getattr(forward, "before", None)) is not None:
            module.__dict__["forward"] = before
    retire(forward)
    return found is None or found is forward


def acceleration(model: nn.Module) -> Acceleration:
    """What `accelerate_` did with this model, module by module.

    Raises FlashNormError if this model object was not accelerated.
    """
    if RECORD not in model.__dict__:
        raise FlashNormError("this model was not accelerated by accelerate_")
    undo: _Undo = model.__dict__[RECORD]
    return undo.acceleration
