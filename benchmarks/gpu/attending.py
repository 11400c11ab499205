"""Attention of one new token: ours against torch's, on caches that are full, or in part.

Ours is checked against float64 before it is timed, and not timed where it is wrong. The other side
is torch's scaled_dot_product_attention, with keys and values as they are (`enable_gqa`) and, as
transformers runs it beside a mask, with copies of them for every head.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.gpu.environment import l2_bytes
from benchmarks.gpu.operations import LEAST_COPIES, SECONDS
from benchmarks.gpu.records import DTYPES, Piece, Row, Run
from benchmarks.gpu.timing import in_turn, per_call
from flashnorm.bench.timing import in_words
from flashnorm.kernels import dispatch
from flashnorm.kernels.backend import Attention
from tests.kernels import attending

STAGE = "attention"
OURS, GROUPED, REPEATED = "ours", "torch, grouped heads", "torch, keys and values repeated"
PIECE = 3.0  # seconds of one case


@dataclass(frozen=True)
class Case:
    """Heads, those of keys and values, their width; positions of the cache, and those in use."""

    heads: int
    groups: int
    width: int
    length: int
    used: int

    def __str__(self) -> str:
        return f"{self.heads}/{self.groups} heads of {self.width}, {self.used} of {self.length}"

    def tiny(self) -> Case:
        share = self.heads // self.groups
        return Case(2 * share, 2, 16, -(-self.length // 64), -(-self.used // 64))


# Llama-3.2-1B, Mistral-7B, heads that share nothing; short, long, and a cache that is mostly empty.
CASES = (
    Case(32, 8, 64, 128, 96),
    Case(32, 8, 64, 4096, 4096),
    Case(32, 8, 128, 4096, 512),
    Case(32, 8, 128, 16384, 16384),
    Case(32, 32, 128, 4096, 4096),
)


def pieces(run: Run) -> Iterator[Piece]:
    for dtype in ("bf16", "fp32"):
        for case in CASES if dtype == "bf16" else CASES[:1]:
            key = {"shape": str(case), "dtype": dtype}
            yield Piece(STAGE, key, PIECE, partial(_row, run, case, DTYPES[dtype]))


def failures(run: Run) -> list[Row]:
    return [row for row in run.store.rows(STAGE) if row["wrong"]]


@torch.no_grad()
def _row(run: Run, case: Case, dtype: torch.dtype) -> Row:
    case = case.tiny() if run.settings.dry else case
    given = [_made(case, dtype, run.settings.device, i) for i in range(_copies(run, case, dtype))]
    wrong = _wrong(*given[0])
    runs: dict[str, Callable[..., Tensor]] = {GROUPED: _grouped, REPEATED: _repeated}
    if not wrong:
        runs = {OURS: _ours, **runs}
    prepared, failed = {}, {}
    for name, each in runs.items():
        try:
            call = partial(_call, each, given)
            prepared[name] = per_call(call, len(given), run.settings.device)
        except Exception as error:
            failed[name] = in_words(error)
    timings, more = in_turn(prepared, run.settings.rounds, SECONDS)
    found = {name: timing.median * 1e6 for name, timing in timings.items()}
    run.say(f"attention, {case}: {wrong or found}")
    return {"wrong": wrong, "microseconds": found, "failed": {**failed, **more}}


def _copies(run: Run, case: Case, dtype: torch.dtype) -> int:
    size = 2 * dtype.itemsize * case.groups * case.width * case.length
    return min(64, max(LEAST_COPIES, -(-2 * l2_bytes(run.settings.device) // size)))


def _made(case: Case, dtype: torch.dtype, device: str, seed: int) -> tuple[Tensor, ...]:
    """q, k, v of a static cache, and the mask of what is in use."""
    torch.manual_seed(seed)
    q = torch.randn(1, case.heads, 1, case.width, device=device).to(dtype)
    k, v = (
        torch.randn(1, case.groups, case.length, case.width, device=device).to(dtype)
        for _ in range(2)
    )
    mask = (torch.arange(case.length, device=device) < case.used)[None, None, None]
    return q, k, v, mask


def _call(each: Callable[..., Tensor], given: list[tuple[Tensor, ...]], i: int) -> Tensor:
    return each(*given[i])


def _ours(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    attention = dispatch.backend_of(q).attention
    assert isinstance(attention, Attention)
    return attention.attend(q, k, v, q.shape[3] ** -0.5, mask)


def _grouped(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, mask, enable_gqa=True)


def _repeated(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    return F.scaled_dot_product_attention(q, k, v, mask)


def _wrong(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> str:
    """Why ours is not what float64 says, or nothing."""
    try:
        given = (t.cpu() for t in (q, k, v))
        found = _ours(q, k, v, mask).cpu()
        attending.assert_close(
            *given, q.shape[3] ** -0.5, mask.cpu(), found, **attending.LOST[q.dtype]
        )
    except Exception as error:
        return in_words(error)
    return ""


def table_rows(rows: list[Row]) -> Iterator[tuple[str, ...]]:
    """A line for each case, those where ours is wrong or slower too."""
    for row in rows:
        times: dict[str, Any] = row["microseconds"]
        cells = [f"{times[n]:.2f}" if n in times else "—" for n in (OURS, GROUPED, REPEATED)]
        rivals = [times[name] for name in (GROUPED, REPEATED) if name in times]
        faster = f"{min(rivals) / times[OURS]:.2f}x" if OURS in times and rivals else "—"
        yield (row["shape"], row["dtype"], *cells, faster, row["wrong"])
