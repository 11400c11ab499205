"""Tiny models to train, with random gains and biases, and ten steps of them."""

from __future__ import annotations

from dataclasses import dataclass, field
from math import sqrt

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig

from flashnorm.verification.bounds import CONFIDENCE, unit_roundoff

WIDTH, FFN, VOCABULARY = 32, 48, 64
LLAMA = LlamaConfig(
    hidden_size=WIDTH,
    intermediate_size=FFN,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    vocab_size=VOCABULARY,
    use_cache=False,
)
GPT2 = GPT2Config(
    n_embd=WIDTH,
    n_layer=2,
    n_head=4,
    vocab_size=VOCABULARY,
    n_positions=32,
    bos_token_id=0,
    eos_token_id=0,
    use_cache=False,
    resid_pdrop=0.0,
    embd_pdrop=0.0,
    attn_pdrop=0.0,
)
DEPTH = 15  # weight matrices on the way of the data
RATE = 0.4


class DyT(nn.Module):
    """As published (arXiv 2503.10622), so that ours is not held against itself."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.alpha = nn.Parameter(torch.full((1,), 0.5))
        self.weight, self.bias = nn.Parameter(torch.ones(width)), nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.alpha * x) * self.weight + self.bias


class Block(nn.Module):
    """A pre-norm block in plain torch: mixing over tokens and a gated network."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = DyT(WIDTH), DyT(WIDTH)
        self.q, self.k, self.v, self.o = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.feed = Gated()

    def forward(self, x: Tensor) -> Tensor:
        z = self.first(x)
        heads = [
            linear(z).unflatten(-1, (4, -1)).transpose(1, 2) for linear in (self.q, self.k, self.v)
        ]
        mixed = nn.functional.scaled_dot_product_attention(*heads, is_causal=True)
        x = x + self.o(mixed.transpose(1, 2).flatten(2))
        return x + self.feed(self.second(x))


class Gated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up, self.down = (
            nn.Linear(WIDTH, FFN),
            nn.Linear(WIDTH, FFN),
            nn.Linear(FFN, WIDTH),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.down(nn.functional.gelu(self.gate(x)) * self.up(x))


class DyTModel(nn.Module):
    """A language model with DyT in the places of norms."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(VOCABULARY, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.norm, self.head = DyT(WIDTH), nn.Linear(WIDTH, VOCABULARY)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.table(ids)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def build(name: str, dtype: torch.dtype) -> nn.Module:
    """In training mode; every vector is 1 + 0.3 N(0, 1) or 0.3 N(0, 1)."""
    torch.manual_seed(0)
    if name == "dyt":
        model: nn.Module = DyTModel()
    else:
        model = AutoModelForCausalLM.from_config({"llama": LLAMA, "gpt2": GPT2}[name])
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.3 * torch.randn_like(parameter))
            else:
                parameter.copy_(torch.randn_like(parameter) / sqrt(WIDTH))
    return model.to(dtype).train()


def batch(rows: int = 4) -> Tensor:
    """Ids [rows, 9] that can be learned: each is the one before plus three."""
    start = torch.randint(0, VOCABULARY, (rows, 1), generator=torch.Generator().manual_seed(5))
    return (start + 3 * torch.arange(9)) % VOCABULARY


def logits_of(model: nn.Module, ids: Tensor) -> Tensor:
    found = model(ids[:, :-1])
    return found if isinstance(found, Tensor) else found.logits


@dataclass
class Run:
    """Of every step: its loss, largest logit, and how far it was to lower the loss: η ‖g‖²."""

    tokens: int
    losses: list[float] = field(default_factory=list)
    largest: list[float] = field(default_factory=list)
    descents: list[float] = field(default_factory=list)


def train(model: nn.Module, steps: int = 10, rank: int = 0, ranks: int = 1) -> Run:
    """SGD on one batch, of which each of several processes sees its rows."""
    optimizer = torch.optim.SGD(model.parameters(), RATE)
    ids = batch().chunk(ranks)[rank]
    run = Run(ids[:, 1:].numel())
    for _ in range(steps):
        optimizer.zero_grad(set_to_none=True)
        logits = logits_of(model, ids)
        wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
        loss = nn.functional.cross_entropy(wide.flatten(0, 1), ids[:, 1:].flatten())
        loss.backward()
        run.losses.append(float(loss.detach()))
        run.largest.append(float(wide.detach().abs().max()))
        run.descents.append(RATE * sum(float(p.grad.norm()) ** 2 for p in model.parameters()))
        optimizer.step()
    return run


def bounds(run: Run, dtype: torch.dtype) -> list[float]:
    """How far two correct ways to train may be apart after each step.

    Logits are off by B of the largest one for the roundings of a pass (d products of width n whose
    results are rounded to the dtype, sums in float32 or better), and a loss by twice that. So is
    every gradient, relatively, and through it each later loss by `B η ‖g‖²` for every step before.
    In half precision the tokens' errors are as good as independent, so that their mean is off by
    1/√T of it; and parameters are rounded at every step, which is one more such error each.
    """
    sums = torch.promote_types(dtype, torch.float32)
    one = CONFIDENCE * sqrt(DEPTH) * (unit_roundoff(dtype) + sqrt(FFN) * unit_roundoff(sums))
    half = dtype != torch.float64
    found, before = [], 0.0
    for step, (largest, descent) in enumerate(zip(run.largest, run.descents, strict=True)):
        rounded = sqrt((1 + step) / run.tokens) if half else 1.0
        found.append(one * rounded * (2 * largest + before))
        before += descent
    return found
