"""From the parameters of a model to the tensors of its checkpoint.

The two differ in names, in prefixes, and in what one tensor holds: experts that are stored one by
one, fused and split projections, other layouts. transformers' own loader is asked: it is given a
`ProvenanceTensor` for every key of the checkpoint, and what arrives in the model says where each
parameter comes from. So a checkpoint means here what it means to `from_pretrained`.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from flashnorm.checkpoint.boxes import Shape
from flashnorm.checkpoint.provenance import Provenance, ProvenanceTensor, whole_tensor
from flashnorm.checkpoint.source import Source
from flashnorm.compat.transformers_names import conversion_rules, knows, load_state, namer
from flashnorm.errors import CheckpointError
from flashnorm.graph.build import fake_model
from flashnorm.loading import knows_type, model_class, quiet_transformers

if TYPE_CHECKING:
    from torch import Tensor, nn

REMEDY = "load the model with transformers, use fold_ on it, then save_pretrained"

Shapes = Mapping[str, Sequence[int]]


@dataclass(frozen=True)
class Mapped:
    """Where each parameter lies in the checkpoint, and of the others why it could not be said.

    `twins` are the other names of a parameter that the checkpoint stores a second time: a tied
    weight in full.
    """

    provenances: dict[str, Provenance]
    twins: dict[str, tuple[str, ...]] = field(default_factory=dict)
    problems: dict[str, str] = field(default_factory=dict)

    def __getitem__(self, parameter: str) -> Provenance:
        """Raises CheckpointError where the parameter cannot be found exactly."""
        if problem := self.problems.get(parameter):
            raise CheckpointError(f"{problem}; {REMEDY}")
        if parameter not in self.provenances:
            raise CheckpointError(
                f"the parameter {parameter} is not in the checkpoint under a name from which "
                f"transformers loads it; {REMEDY}"
            )
        return self.provenances[parameter]


def map_parameters(
    source: Source,
    wanted: Iterable[str] = (),
    shapes: Shapes | None = None,
    *,
    untied: bool = False,
) -> Mapped:
    """Where the parameters of a checkpoint's model lie in its tensors, or in others of `shapes`.

    The model is built from the config, without memory. `wanted` are parameters that it must have:
    where the class that the config names lacks one, a class with a head is taken; `untied` takes
    the config as it is when the head is tied no more. A config that transformers does not know has
    a model of one's own, whose parameters have their own names.
    """
    if shapes is None:
        shapes = {name: place.entry.shape for name, place in source.where.items()}
    if (config := _read_config(source)) is None:
        return Mapped({name: whole_tensor(name, shape) for name, shape in shapes.items()})
    if untied:
        _untie(config)
    wanted, text = set(wanted), config.to_json_string(use_diff=False)
    stored = tuple((name, tuple(shape)) for name, shape in shapes.items())
    for cls in _classes(config):
        names, mapped = _answer(_Question(cls, text, stored, config))
        if wanted <= names:
            return mapped
    raise CheckpointError(
        f"the plan names the parameter {min(wanted - names)}, which the model does not have: "
        "make the plan from this checkpoint, with flashnorm.inspect"
    )


def build_model(source: Source, wanted: Iterable[str]) -> nn.Module | None:
    """The model of a checkpoint without values; None where transformers does not know it."""
    if (config := _read_config(source)) is None:
        return None
    with quiet_transformers():
        models = (fake_model(cls, config) for cls in _classes(config))
        return next(m for m in models if {*wanted} <= {name for name, _ in _named(m)})


@dataclass(frozen=True)
class _Question:
    """Which model, by its class and the text of its config, and which tensors."""

    cls: Any
    text: str
    stored: tuple[tuple[str, Shape], ...]
    config: Any = field(compare=False)


@lru_cache(maxsize=2)  # a plan and its execution ask the same
def _answer(question: _Question) -> tuple[frozenset[str], Mapped]:
    """The names of the model's parameters, and where they lie."""
    with quiet_transformers():
        model = fake_model(question.cls, question.config)
        return frozenset(name for name, _ in _named(model)), ask_loader(
            model, dict(question.stored)
        )


def _read_config(source: Source) -> Any | None:
    """The config as transformers reads it; None where it does not know the model."""
    from transformers import CONFIG_MAPPING

    model_type = source.config.get("model_type")
    if not knows_type(model_type):
        return None
    with quiet_transformers():
        try:
            return CONFIG_MAPPING[model_type].from_pretrained(source.path)
        except Exception as error:
            raise CheckpointError(
                f"transformers cannot read the config.json of {source.path.name}, so the names in "
                f"this checkpoint cannot be told: {error}"
            ) from error


def _untie(config: Any) -> None:
    parts: list[Any] = [config, getattr(config, "text_config", None)]
    for part in parts:
        if getattr(part, "tie_word_embeddings", False):
            part.tie_word_embeddings = False


def _classes(config: Any) -> list[Any]:
    """The class that the config names, then those with a head that know its type."""
    import transformers

    autos = (transformers.AutoModelForCausalLM, transformers.AutoModelForSeq2SeqLM)
    known = [auto for auto in autos if knows(auto, config)]
    return list(dict.fromkeys([model_class(config), *known]))


def ask_loader(model: nn.Module, shapes: Shapes) -> Mapped:
    """What transformers' loader makes of tensors of these names and shapes.

    `model` has the right shapes and no values; its parameters are replaced.
    """
    given: Any = model
    groups: dict[int, list[str]] = defaultdict(list)
    for name, value in _named(model):
        groups[id(value)].append(name)
    state = {name: ProvenanceTensor.of(name, shape) for name, shape in shapes.items()}
    with quiet_transformers():
        rules = conversion_rules(given)
        info = load_state(given, state, rules)
    found = {name: v.provenance() for name, v in _named(model) if isinstance(v, ProvenanceTensor)}
    problems = {**_unconverted(info), **_taken_twice(given, rules, shapes, found)}
    for names in groups.values():
        told = [problems[name] for name in names if name in problems]
        problems |= dict.fromkeys(names if told else (), *told[:1])
    return Mapped(*_shared(found, groups.values()), problems)


def _named(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from model.named_parameters(remove_duplicate=False)
    yield from model.named_buffers(remove_duplicate=False)


def _shared(
    found: dict[str, Provenance], groups: Iterable[list[str]]
) -> tuple[dict[str, Provenance], dict[str, tuple[str, ...]]]:
    """Names of one and the same parameter have what is stored under any of them."""
    provenances, twins = dict(found), {}
    for names in groups:
        stored = {found[name].tensors: name for name in names if name in found}
        for name in names if stored else ():
            provenances.setdefault(name, found[next(iter(stored.values()))])
            others = tuple(
                other for key, other in stored.items() if key != provenances[name].tensors
            )
            if others:
                twins[name] = others
    return provenances, twins


def _unconverted(info: Any) -> dict[str, str]:
    """Parameters that the loader could not make from the tensors, or not in their shape."""
    problems = {}
    for name, text in info.conversion_errors.items():
        why = text.rpartition("\nError: ")[0].strip().rpartition("\n")[2]
        problems[name] = f"transformers converts tensors into {name} in a way not followed ({why})"
    for name, stored, wanted in info.mismatched_keys:
        problems[name] = (
            f"the checkpoint holds {name} in the shape {list(stored)}, but its config says "
            f"{list(wanted)}"
        )
    return problems


def _taken_twice(
    model: Any, rules: list[Any], shapes: Shapes, found: dict[str, Provenance]
) -> dict[str, str]:
    """Parameters for which the checkpoint holds more tensors than the loader uses."""
    used = {tensor for provenance in found.values() for tensor in provenance.tensors}
    name_of, problems = namer(model, rules), {}
    for key in sorted(shapes.keys() - used):
        name = name_of(key)
        if name in found:
            problems[name] = (
                f"the checkpoint holds {key} beside {found[name].tensors[0]}, and transformers "
                f"loads only one of them as {name}"
            )
    return problems
