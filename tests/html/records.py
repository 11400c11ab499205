"""Records of every kind for pages, small and made by hand; their names may be an attack."""

from __future__ import annotations

from flashnorm.bench.records import (
    EAGER,
    FORWARD,
    GENERATE,
    OURS,
    PREFILL,
    Bandwidth,
    Check,
    Engine,
    Failure,
    Measured,
    Memory,
    Result,
    Row,
    Settings,
    Timing,
)
from flashnorm.plan import Cancelling, Consumer, Gain, Plan, Renorm, ScaledReader, Site, Span
from flashnorm.runtime.accelerate import Acceleration, Part
from flashnorm.verification.report import (
    Deviation,
    Greedy,
    LayerError,
    Pair,
    Perplexity,
    Report,
)

WIDTH = 8
ATTACK = (
    "<script>alert(1)</script><img src='http://127.0.0.1:9/x' onerror=\"alert(2)\">&amp;{{7*7}}"
)


def site(path: str, *readers: str, state: str = "folded", reason: str = "", **more: object) -> Site:
    consumers = tuple(
        Consumer(f"{name}.weight", 1, (Span(0, 0, WIDTH),), f"{name}.bias") for name in readers
    )
    scaled = tuple(
        ScaledReader(f"{name}.weight", name, "output", ((0, WIDTH),), "", WIDTH) for name in readers
    )
    gain = Gain(f"{path}.weight", 1.0)
    fields = {"scale": "deferred", "readers": scaled, "source": "model.py:7", **more}
    return Site(path, "rms", WIDTH, 1e-6, state, reason, consumers, gain, **fields)


def layer(at: int, prefix: str = "m.layers") -> list[Site]:
    where = f"{prefix}.{at}"
    return [
        site(f"{where}.norm", f"{where}.att.q", f"{where}.att.k"),
        site(f"{where}.att.q_norm", state="kept", reason=f"'{where}.att' reads it twice"),
        site(
            f"{where}.post",
            f"{where}.up",
            bias="carried",
            bias_reason="no reader has a bias",
            centering="folded",
            scale="cancelled",
            scale_reason=f"every reader of {where}.post is normalized again",
            renorms=(Renorm(f"{where}.att.q_norm", (0,)),),
        ),
    ]


def plan(layers: int = 3, prefix: str = "m.layers") -> Plan:
    sites = [each for at in range(layers) for each in layer(at, prefix)]
    last = Site("m.end", "rms", WIDTH, None, "none", "it has no gain")
    notes = (f"a note about {prefix}",)
    cut = tuple(Cancelling(f"{prefix}.{at}.post") for at in range(layers))
    return Plan((*sites, last), (("new", prefix),), (f"{prefix}.left",), notes, (), (), cut)


def deviation(size: float) -> Deviation:
    return Deviation(size, size / 2, size / 3)


def report(ok: bool = True, name: str = "a", layers: tuple[LayerError, ...] = ()) -> Report:
    error = 3e-15 if ok else 2e-3
    return Report(
        reference=f"models/{name}",
        candidate=f"models/{name}-folded",
        output="logits",
        inputs="a text",
        rows=512,
        width=64,
        depth=12,
        stored="float32",
        float64=deviation(error),
        float64_bound=1e-12,
        float32=deviation(2e-6),
        float32_bound=5e-5,
        precise=Pair(deviation(1e-6), deviation(1.1e-6), 0.01),
        half_dtype="bfloat16",
        half=Pair(deviation(2e-2), deviation(2e-2), 0.01),
        kl=1e-9,
        perplexity=Perplexity(12.5, 12.6, 0.99, 100, 50),
        greedy=Greedy((1, 2), (1, 2), None, None, 1e-5, 32, (f"so {name}", f"so {name}")),
        layers=layers,
        notes=(f"a note on {name}",),
        seconds=3.0,
    )


def failing(name: str = "a") -> Report:
    """The second of three modules is the first wrong one; a third is no number."""
    errors = (0.0, 4e-4, float("nan"), float("inf"), 0.02)
    paths = (f"m.0.{name}", f"m.1.{name}", f"m.2.{name}", f"m.3.{name}", "m.4")
    return report(False, name, tuple(map(LayerError, paths, errors)))


def acceleration(prefix: str = "m.layers", own: str = "it is called with three arguments"):
    parts = []
    for at in range(3):
        where = f"{prefix}.{at}"
        parts += [
            Part(f"{where}.att.q", "linear"),
            Part(f"{where}.att.k", "linear"),
            Part(f"{where}.up", "linear", f"{own} in {where}"),
            Part(f"{where}.norm", "norm", precomputed=(f"{where}.att.q", f"{where}.att.k")),
        ]
    parts += [Part("head", "linear"), Part("m.end", "norm")]
    training = (Part("m.end", "norm", own),)
    return Acceleration(
        tuple(parts), "test kernels", own, True, training, "", "a package", "captured"
    )


def timed(seconds: float) -> Timing:
    return Timing((seconds, seconds * 1.1, seconds * 0.9))


def bench(speedup: float = 2.0, name: str = "a", complete: bool = True) -> Result:
    rows = [row(kind, 1, 8e-3, speedup, context=64) for kind in (GENERATE, FORWARD)] + [
        row(PREFILL, count, count * 1e-3, speedup) for count in (1, 16)
    ]
    measured = Measured(
        "bf16",
        10**6,
        10**6,
        tuple(Check(each, 4, 4, None, None, 1e-3, 1e-3) for each in (EAGER, OURS)),
        tuple(each for pair in rows for each in pair),
        (Memory(EAGER, 2048, 10**9, 9 * 10**8), Memory(OURS, 2048, 8 * 10**8, None, 5, 10**7)),
        Bandwidth(20.0, 30.0),
        (Failure("compile", "warming up", f"no compiler for {name}"),),
        (Engine(f"engine {name}", "1.0", "a note", f"{name}.bin", 3, 4, 0.1),),
    )
    machine: dict[str, str | int] = {
        word: f"{word} {name}" for word in ("cpu", "kernels", "torch", "transformers", "flashnorm")
    }
    machine |= {"cores": 2, "threads": 1, "date": "2024-01-02"}
    settings = Settings(f"models/{name}")
    return Result(settings, machine, (measured,), (f"note {name}",), complete)


def row(kind: str, tokens: int, seconds: float, speedup: float, **more: int) -> tuple[Row, Row]:
    slow, fast = timed(seconds), timed(seconds / speedup)
    return Row(kind, tokens, EAGER, slow, 1.0, **more), Row(
        kind, tokens, OURS, fast, speedup, **more
    )


def every(name: str = "a"):
    """One record of each kind whose texts hold `name`."""
    return {
        "inspect": plan(prefix=f"m.{name}.layers"),
        "verify": report(name=name),
        "verify, not equal": failing(name),
        "bench": bench(name=name),
        "acceleration": acceleration(f"m.{name}.layers", f"a reason with {name}"),
    }
