"""What a plan is made of: what was found, what will be folded where, and why the rest is kept.

A plan is frozen, printable and JSON-serializable, and is made before anything is touched. The same
plan drives the rewrite in memory and on disk.
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, is_dataclass
from functools import cache
from sys import float_info
from types import UnionType
from typing import Any, Literal, get_args, get_origin, get_type_hints

from flashnorm.errors import PlanError
from flashnorm.paged import Paged

PLAN_VERSION = 3

# The name of a norm kind, as `kernels/norms.py` has them.
Kind = str
GainState = Literal["folded", "kept", "none"]
# "folded" goes into the readers' biases (E2); "carried" stays with the norm as β/g (E13).
BiasState = Literal["none", "folded", "carried", "kept"]
CenteringState = Literal["none", "folded", "kept"]
# Where the scale per row ends: with the norm, with its linear readers (E4), partly in other norms
# that undo it, or there altogether (E7).
ScaleState = Literal["kept", "deferred", "partial", "cancelled"]
Place = Literal["nowhere", "output", "later"]
# What norms that undo a scale s do with their epsilon: divide it by s², or leave it, as the paper.
Epsilon = Literal["exact", "ignore"]


@dataclass(frozen=True)
class Span:
    """Columns `start : start + length` of a consumer carry gain elements from `gain_start` on."""

    start: int
    gain_start: int
    length: int


@dataclass(frozen=True)
class Consumer:
    """A parameter that absorbs a gain along one of its axes (`W* = W diag(g)`, E1).

    `bias` is the parameter that is added to its product and takes `W β` where the norm's bias is
    folded (E2); W is then a matrix. Empty where there is none, or where it takes nothing.
    """

    parameter: str
    axis: int
    spans: tuple[Span, ...]
    bias: str = ""


@dataclass(frozen=True)
class Gain:
    """The gain that the model uses, as an affine function of a parameter: `offset + scale · p`.

    Plain gains are (0, 1); gains stored as a difference from one are (1, 1).
    """

    parameter: str
    offset: float = 0.0
    scale: float = 1.0

    @property
    def identity(self) -> float:
        """The value of the parameter at which the gain is one."""
        return (1.0 - self.offset) / self.scale


@dataclass(frozen=True)
class Centering:
    """A writer of a residual stream: its mean over `axis` is subtracted (`V* = V − mean`, E3)."""

    parameter: str
    axis: int


@dataclass(frozen=True)
class Entry:
    """A place where a stream begins with values that no linear layer writes.

    They are centered as they come out of the module at `path`, or with `received` as they go in.
    Only a model in memory can have one; a stored checkpoint keeps its LayerNorms.
    """

    path: str
    received: bool = False


@dataclass(frozen=True)
class Cancelling:
    """A norm whose scale is taken out, because other norms undo it, `RMS(s·v) = RMS(v)` (E7).

    Its site says by which `readers` and `renorms`. Only a model in memory can have one; in a stored
    checkpoint the norm keeps its scale.
    """

    path: str
    epsilon: Epsilon = "exact"


@dataclass(frozen=True)
class ScaledReader:
    """A product with a norm's output, and where the norm's scale goes on its output features.

    `scaled` are the (start, length) of the features that get it: at the product's own `output`, or
    `later` at the output of the product with the parameter `after` (E8, E12), or `nowhere` (E7).
    `path` is the module that is this product and nothing else, empty where there is none.
    `multiplies` counts what the scale costs there per row.
    """

    parameter: str
    path: str
    place: Place
    scaled: tuple[tuple[int, int], ...]
    after: str
    multiplies: int


@dataclass(frozen=True)
class Renorm:
    """A norm that undoes the scale of another one; its epsilon is then divided by s² (E7).

    Axis `rows[i]` of what it normalizes is the i-th row axis of what the other norm reads.
    """

    path: str
    rows: tuple[int, ...]


@dataclass(frozen=True)
class NormBias:
    """The bias β of a norm, and the gain before it: element i of one meets element i of the other.

    `folded` where β goes into the readers' biases (E2) and is left at zero; else it is carried:
    it stays as β/g, which becomes β in the readers that absorb g (E13).
    """

    parameter: str
    gain: Gain
    folded: bool


@dataclass(frozen=True)
class Site:
    """One normalization: where it is, what it is, and what happens to its gain, bias and centering.

    `path` is the module that normalizes, `width` the number of normalized features, `eps` the
    epsilon read off the graph (None where there is none). `reason` is empty where the gain is
    folded, else it says in plain words why not; `bias_reason` says why a bias is not folded into
    the readers, `centering_reason` why the mean is still subtracted. `norm_bias` names the
    parameter of the bias. `source` is the file and line of the model's code. `replaceable` where
    the module at `path` is this norm and nothing else, so that another module can take its place.

    `scale` says where the scale per row of an RMSNorm may be applied, `scale_reason` why not
    elsewhere; `readers` and `renorms` say it one by one. `quantized` names the readers that hold
    packed weights: nothing is folded into them, `accelerate_` defers the norm into them.

    `kind` is "rms", "layer", "dyt", "group" or "other"; `gain_state` "folded", "kept" or "none";
    `bias` one of these or "carried"; `centering` "folded", "kept" or "none"; `scale` "kept",
    "deferred", "partial" or "cancelled".
    """

    path: str
    kind: Kind
    width: int
    eps: float | None
    gain_state: GainState
    reason: str = ""
    consumers: tuple[Consumer, ...] = ()
    gain: Gain | None = None
    source: str = ""
    bias: BiasState = "none"
    bias_reason: str = ""
    norm_bias: str = ""
    centering: CenteringState = "none"
    centering_reason: str = ""
    replaceable: bool = False
    scale: ScaleState = "kept"
    scale_reason: str = ""
    readers: tuple[ScaledReader, ...] = ()
    renorms: tuple[Renorm, ...] = ()
    quantized: tuple[str, ...] = ()

    @property
    def saved_multiplies(self) -> int:
        """Multiplications per row that deferral saves, against one per feature of the norm."""
        if self.scale == "kept":
            return 0
        # Readers that wait for the same product share what it costs there.
        later = {reader.after: reader.multiplies for reader in self.readers if reader.after}
        at_once = sum(reader.multiplies for reader in self.readers if not reader.after)
        return self.width - at_once - sum(later.values())


@dataclass(frozen=True)
class Plan(Paged, pages="flashnorm.html.inspected"):
    """All sites of a model in the order of execution, and what holds for the model as a whole.

    `centerings` are the writers to center so that the centered sites need no mean, `entries` the
    places where that takes an operation of its own. `cancellings` are the norms that lose their
    scale.

    `untied` lists (new parameter, parameter it is copied from): a tied weight that gets a copy of
    its own so that it can absorb a gain. `unreached` lists the parameters that the recorded passes
    did not read, so that nothing is known of them.
    """

    sites: tuple[Site, ...]
    untied: tuple[tuple[str, str], ...] = ()
    unreached: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    centerings: tuple[Centering, ...] = ()
    entries: tuple[Entry, ...] = ()
    cancellings: tuple[Cancelling, ...] = ()
    version: int = field(default=PLAN_VERSION)

    @property
    def folded(self) -> tuple[Site, ...]:
        """The sites whose gain is folded."""
        return tuple(site for site in self.sites if site.gain_state == "folded")

    def gains(self) -> tuple[Gain, ...]:
        """Every gain parameter that is folded, once each (two sites may share one)."""
        return tuple(dict.fromkeys(site.gain for site in self.folded if site.gain))

    def absorptions(self) -> dict[str, tuple[tuple[Gain, Consumer], ...]]:
        """For every parameter that absorbs: the gains that go into it, once each."""
        found: dict[str, dict[tuple[Gain, Consumer], None]] = defaultdict(dict)
        for gain, consumer in self._pairs():
            found[consumer.parameter][gain, consumer] = None
        return {name: tuple(pairs) for name, pairs in found.items()}

    def norm_biases(self) -> tuple[NormBias, ...]:
        """Every bias that moves with its gain, once each."""
        found = (
            NormBias(site.norm_bias, site.gain, site.bias == "folded")
            for site in self.folded
            if site.norm_bias and site.gain
        )
        return tuple(dict.fromkeys(found))

    def bias_absorptions(self) -> dict[str, tuple[tuple[NormBias, Consumer], ...]]:
        """For every bias that absorbs: which norms' biases, through which weight (E2).

        `c* = c + W β` with W as it is before it absorbs any gain.
        """
        found: dict[str, dict[tuple[NormBias, Consumer], None]] = defaultdict(dict)
        for site in self.folded:
            if site.bias == "folded" and site.gain:
                norm_bias = NormBias(site.norm_bias, site.gain, True)
                for consumer in site.consumers:
                    found[consumer.bias][norm_bias, consumer] = None
        return {name: tuple(pairs) for name, pairs in found.items()}

    def _pairs(self) -> Iterator[tuple[Gain, Consumer]]:
        for site in self.folded:
            assert site.gain is not None, f"{site.path} is folded but has no gain"
            for consumer in site.consumers:
                yield site.gain, consumer

    def __str__(self) -> str:
        """A line per site; `flashnorm inspect` prints a table."""
        lines = [f"{len(self.folded)} of {len(self.sites)} gains folded"]
        for site in self.sites:
            into = ", ".join(consumer.parameter for consumer in site.consumers)
            what = f"into {into}" if into else site.reason
            lines.append(
                f"{site.path or '(root)'}: {site.kind} {site.width}, {site.gain_state}: {what}"
            )
        return "\n".join([*lines, *self.notes])

    def to_json(self) -> dict[str, Any]:
        """A JSON-serializable dict; `Plan.from_json` inverts it."""
        return json.loads(json.dumps(asdict(self)))

    @staticmethod
    def from_json(data: dict[str, Any]) -> Plan:
        """The plan that `to_json` wrote.

        Raises PlanError, a ValueError, for a plan of another version and for what is none: every
        value has to be of its type, and every folded site to say all that a fold needs.
        """
        if not isinstance(data, dict):
            raise PlanError(f"a plan is a JSON object, not {type(data).__name__}")
        if data.get("version") != PLAN_VERSION:
            raise PlanError(
                f"plan version {str(data.get('version'))[:40]!r} found, {PLAN_VERSION} expected: "
                "make the plan again with this version of flashnorm"
            )
        try:
            plan: Plan = _read(Plan, data, "plan")
        except (TypeError, ValueError, RecursionError) as error:
            raise PlanError(f"this is no plan: {error}") from error
        for site in plan.sites:
            _check(site)
        return plan


def _read(kind: Any, data: Any, where: str) -> Any:
    """The value of a type from what `asdict` and JSON made of it.

    Raises ValueError or TypeError for what is not of the type. Numbers are finite.
    """
    if isinstance(kind, type) and is_dataclass(kind):
        kinds = _hints(kind)
        if not isinstance(data, dict) or not data.keys() <= kinds.keys():
            raise ValueError(f"{where} is no {kind.__name__}")
        read = {name: _read(kinds[name], item, name) for name, item in data.items()}
        return kind(**read)
    parts = get_args(kind)
    if get_origin(kind) is tuple:
        if not isinstance(data, (list, tuple)):
            raise ValueError(f"{where} is no list")
        each = [parts[0]] * len(data) if parts[-1] is ... else parts
        return tuple(_read(part, item, where) for part, item in zip(each, data, strict=True))
    if get_origin(kind) is UnionType:  # of something or None
        return None if data is None else _read(parts[0], data, where)
    if not (data in parts if get_origin(kind) is Literal else _is(kind, data)):
        raise ValueError(f"{where} is {str(data)[:40]!r}")
    return data


def _is(kind: type, data: Any) -> bool:
    if kind is float:
        return type(data) in (int, float) and abs(data) <= float_info.max
    if kind is int:
        return type(data) is int and abs(data) < 1 << 63
    return type(data) is kind


def _check(site: Site) -> None:
    """Raise PlanError where a site does not say all that its fold needs."""
    if site.gain is not None and not 0 < abs(site.gain.scale) < math.inf:
        raise PlanError(f"{site.path}: the gain is {site.gain.scale} times its parameter")
    spans = [span for consumer in site.consumers for span in consumer.spans]
    if min([site.width, *(n for s in spans for n in (s.start, s.gain_start, s.length))]) < 0:
        raise PlanError(f"{site.path}: a place or a length of it is negative")
    if site.gain_state != "folded":
        return
    if site.gain is None:
        raise PlanError(f"{site.path} is folded but has no gain")
    if site.bias in ("folded", "carried") and not site.norm_bias:
        raise PlanError(f"{site.path}: its bias is {site.bias}, but it has none")
    if site.bias == "folded" and not all(consumer.bias for consumer in site.consumers):
        raise PlanError(f"{site.path}: its bias is folded into readers without one")


@cache
def _hints(noun: type) -> dict[str, Any]:
    return get_type_hints(noun)
