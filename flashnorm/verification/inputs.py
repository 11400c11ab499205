"""What both models are run on: windows of a text, random tokens, or the caller's own inputs."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

import torch
from torch import Tensor, nn

from flashnorm.compat.torch_names import tree_leaves, tree_map_only
from flashnorm.errors import FlashNormError
from flashnorm.graph.recording import input_sets

Inputs = Mapping[str, Any] | tuple[Any, ...]

TEXT = "founding_documents.txt"
WINDOW = 256  # tokens that see each other; long enough for attention to matter
OUTPUT_ELEMENTS = 1 << 25  # of one model's compared outputs: 256 MiB in float64
SEED = 0
STREAMED = (
    "the weights were read from disk while they were used: no tokens were generated, and the "
    "perplexity is that of the {} compared tokens; flashnorm verify --quick proves the weights "
    "bit for bit"
)


@dataclass(frozen=True)
class Samples:
    """`windows` are compared in full, `ids` [N] carry the perplexity (None without token ids).

    streamed: every pass reads the weights from disk, so there is one window, it carries the
    perplexity as well, and nothing is generated.
    """

    windows: tuple[Inputs, ...]
    ids: Tensor | None
    tokenizer: Any | None
    origin: str
    notes: tuple[str, ...] = ()
    streamed: bool = False


def own_inputs(example_inputs: Inputs) -> Samples:
    """The caller's inputs as windows: one, or a list of several. A tensor is one argument."""
    if not isinstance(example_inputs, Mapping | tuple | list | Tensor):
        raise FlashNormError(
            f"example_inputs is a {type(example_inputs).__name__}: give a dict of keyword "
            "arguments or a tuple of positional ones"
        )
    note = "the example inputs hold no text: no perplexity and no greedy tokens"
    return Samples(tuple(input_sets(example_inputs)), None, None, "example_inputs", (note,))


def token_samples(
    model: nn.Module,
    tokenizer: Any | None,
    text: str | None,
    tokens: int,
    sample: int,
    streamed: bool = False,
) -> Samples:
    """Windows for a model that reads token ids: from `text`, or random where it has no tokenizer.

    tokens: how many carry the perplexity; sample: how many are compared in full, fewer where the
    vocabulary is so large that the outputs would not fit in OUTPUT_ELEMENTS.
    """
    config = _text_config(model)
    notes: tuple[str, ...] = ()
    if tokenizer is None:
        ids, origin = _random_ids(int(config.vocab_size), tokens), "seeded random tokens"
        notes = ("there is no tokenizer: the tokens are random, and so is the perplexity on them",)
    else:
        ids, origin = _text_ids(tokenizer, text, tokens), "the given text" if text else TEXT
        _check_ids(ids, int(config.vocab_size))
    rows = max(1, min(sample, OUTPUT_ELEMENTS // int(config.vocab_size)))
    window = min(rows if streamed else WINDOW, longest(model), rows, len(ids))
    starts = range(0, min(rows, len(ids)) - window + 1, window) or range(1)
    windows = tuple(model_inputs(model, ids[start : start + window]) for start in starts)
    if streamed:
        windows, ids, notes = windows[:1], ids[:window], (*notes, STREAMED.format(window))
    return Samples(windows, ids, tokenizer, origin, notes, streamed)


def model_inputs(model: nn.Module, ids: Tensor) -> dict[str, Tensor]:
    """The keyword arguments that run a token model on `ids` [T]."""
    batch = ids[None]  # [1, T]
    if getattr(model.config, "is_encoder_decoder", False):
        return {"input_ids": batch, "decoder_input_ids": batch}
    return {"input_ids": batch}


def longest(model: nn.Module) -> int:
    """How many tokens fit in the context; some positions stay free for those that offset them."""
    limit = getattr(_text_config(model), "max_position_embeddings", None)
    return max(1, limit - 4) if isinstance(limit, int) and limit > 0 else 1 << 20


def reads_tokens(model: nn.Module) -> bool:
    """Whether transformers describes the model as one that starts from token ids."""
    return getattr(model, "main_input_name", None) == "input_ids" and hasattr(
        _text_config(model), "vocab_size"
    )


def writes_tokens(model: nn.Module) -> bool:
    """Whether it predicts the next token of its own input, so that perplexity means something."""
    able = getattr(model, "can_generate", None)
    if able is None or not able():
        return False
    return not getattr(model.config, "is_encoder_decoder", False)


def run(model: nn.Module, inputs: Inputs) -> Any:
    """One forward pass without a cache, on the model's device."""
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    inputs = tree_map_only(Tensor, lambda tensor: _placed(tensor, device, model), inputs)
    if not isinstance(inputs, Mapping):
        return model(*inputs)
    if "use_cache" in inspect.signature(model.forward).parameters:
        return model(**{"use_cache": False, **inputs})
    return model(**inputs)


def output_of(result: Any) -> tuple[str, Tensor]:
    """The name and value of the output that is compared: the logits, else the first float tensor.

    Raises FlashNormError where the model returned no floating point tensor.
    """
    if isinstance(result, Mapping) and isinstance(result.get("logits"), Tensor):
        return "logits", result["logits"]
    named = result.items() if isinstance(result, Mapping) else [("the first output", result)]
    for name, value in named:
        for leaf in tree_leaves(value):
            if isinstance(leaf, Tensor) and leaf.is_floating_point():
                return name, leaf
    raise FlashNormError(
        f"the model returned {type(result).__name__} without a floating point tensor: wrap it in a "
        "module that returns what is to be compared"
    )


@contextmanager
def evaluating(model: nn.Module) -> Iterator[nn.Module]:
    """The model in eval mode; every module is as it was when the context ends."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield model
    finally:
        for module in training:
            module.training = True


def _placed(tensor: Tensor, device: torch.device, model: nn.Module) -> Tensor:
    """On the device of the model, and a floating input in the dtype of its parameters."""
    if not tensor.is_floating_point():
        return tensor.to(device)
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), tensor.dtype)
    return tensor.to(device, dtype)


def _text_config(model: nn.Module) -> Any:
    config = getattr(model, "config", None)
    getter = getattr(config, "get_text_config", None)
    return config if getter is None else getter()


def _random_ids(vocabulary: int, tokens: int) -> Tensor:
    generator = torch.Generator().manual_seed(SEED)
    return torch.randint(vocabulary, (tokens,), generator=generator)


def _text_ids(tokenizer: Any, text: str | None, tokens: int) -> Tensor:
    if text is None:
        text = files("flashnorm.data").joinpath(TEXT).read_text("utf-8")
    ids = tokenizer(text, truncation=False, verbose=False)["input_ids"]
    if len(ids) < 2:
        raise FlashNormError(f"the text has {len(ids)} tokens: give a longer one")
    return torch.tensor(ids[:tokens])


def _check_ids(ids: Tensor, vocabulary: int) -> None:
    if int(ids.max()) >= vocabulary:
        raise FlashNormError(
            f"the tokenizer gave token {int(ids.max())}, the model knows {vocabulary}: they do not "
            "belong together; pass the right tokenizer="
        )
