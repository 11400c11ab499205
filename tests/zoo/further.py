"""Tiny models of the types beyond causal LMs, and what their forwards read."""

from __future__ import annotations

import copy
import inspect
import itertools
import re

import torch
from torch import nn
from transformers import CONFIG_MAPPING

from flashnorm.graph.modalities import _with_parts, combinations

from .build import randomize_
from .classes import NoModel, model_class
from .shrink import FIRST_SPECIAL, LEVELS, shrink

BATCH, TOKENS = 2, 7
LARGEST = 40_000_000  # parameters: more is not tiny
TRIED = 60


class NotTiny(Exception):
    """No level of shrinking gave a model that runs; the message has a cause for each."""

    category = "cannot be built tiny by rule"

    @classmethod
    def categories(cls) -> set[str]:
        return {cls.category, *(part.category for part in cls.__subclasses__())}


class NoInputs(NotTiny):
    """A model was built, and no rule makes what its forward reads."""

    category = "no rule makes what its forward reads"


def further_model(model_type: str, seed: int = 0) -> tuple[nn.Module, dict]:
    """A tiny model of a type and inputs that it accepts, at the first level that runs."""
    cls = model_class(model_type)
    causes: list[Exception] = []
    for level in LEVELS:
        try:
            model = _build(cls, model_type, level, seed)
            return model, further_inputs(model)
        except ImportError as error:
            raise NoModel(NoModel.package, _packages(error)) from error
        except Exception as error:
            causes.append(error)
    text = " | ".join(f"{type(error).__name__}: {error}" for error in causes)
    failure = NoInputs if any(isinstance(error, NoInputs) for error in causes) else NotTiny
    raise failure(text) from causes[0]


def _packages(error: ImportError) -> str:
    """The packages that an error of transformers asks for."""
    found = re.findall(r"requires the ([\w.-]+) library", str(error))
    return ", ".join(dict.fromkeys(found)) or str(error.name or error)


def _build(cls, model_type: str, level, seed: int) -> nn.Module:
    config = _config_for(cls, shrink(CONFIG_MAPPING[model_type], model_type, level=level))
    options = {"attn_implementation": "eager", "dtype": torch.float32}
    with torch.device("meta"):
        empty = cls._from_config(copy.deepcopy(config), **options)
    size = sum(p.numel() for p in empty.parameters())
    if size > LARGEST:
        raise ValueError(f"{size} parameters")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = cls._from_config(config, **options).eval()
    if model._can_set_experts_implementation():
        model.set_experts_implementation("batched_mm")
    randomize_(model, seed)
    return model


def _config_for(cls, config):
    """The configuration itself, or the part of it that the class takes."""
    if cls.config_class is None or isinstance(config, cls.config_class):
        return config
    parts = [getattr(config, name) for name in type(config).sub_configs]
    return next((part for part in parts if isinstance(part, cls.config_class)), config)


def further_inputs(model: nn.Module) -> dict:
    """The first of the candidates, the richest first, that the model runs on."""
    failures, tried = [], copy.deepcopy(model)  # some keep state from one call to the next
    for inputs in _candidates(model):
        try:
            return _run_with_placeholders(tried, inputs)
        except Exception as error:
            failures.append((error, ", ".join(inputs)))
    if not failures:
        raise NoInputs("no rule makes any of its arguments")
    error, given = failures[0]
    raise NoInputs(f"{type(error).__name__}: {str(error)[:150]} ({given})") from error


def _candidates(model: nn.Module):
    parameters = inspect.signature(model.forward).parameters
    accepted = frozenset(parameters)
    required = frozenset(n for n, p in parameters.items() if p.default is p.empty)
    texts = list(_texts(model, accepted))
    for other in itertools.islice(combinations(accepted, required, model.config), TRIED):
        for text in texts:
            yield {**text, **other}
        if "input_ids" not in required:
            yield other
    yield from texts


def _texts(model: nn.Module, accepted):
    ids = _ids(model)
    names = [n for n in accepted if n.endswith("input_ids")]
    if not names:
        return
    text = {name: ids.clone() for name in sorted(names)}
    if "mm_token_type_ids" in accepted:
        text["mm_token_type_ids"] = torch.zeros_like(ids)
    boxes = {}
    if "bbox" in accepted:
        corner = torch.sort(torch.rand(BATCH, TOKENS, 2, 2), dim=-2).values
        boxes["bbox"] = (corner.flatten(-2) * 30).long()
    yield {**text, **boxes}
    for books in _codebooks(model.config):
        yield {name: ids.repeat_interleave(books, 0) for name in text}
        yield {name: torch.stack([ids % 50] * books, -1) for name in text}
        yield {name: torch.stack([ids % 50] * (books + 1), -1) for name in text}
    if len(names) > 1 and "input_ids" in names:
        yield {"input_ids": ids, **boxes}


def _codebooks(config) -> list[int]:
    """Sound in several streams of tokens: how many."""
    counts = (getattr(config, name, None) for name in ("num_codebooks", "num_channels"))
    return list(dict.fromkeys(count for count in counts if isinstance(count, int) and count > 1))


def _ids(model: nn.Module) -> torch.Tensor:
    try:
        limit = min(FIRST_SPECIAL, model.get_input_embeddings().weight.shape[0])
    except Exception:
        sizes = (getattr(config, "vocab_size", None) for config in _with_parts(model.config))
        limit = min(
            FIRST_SPECIAL, *(size for size in sizes if isinstance(size, int)), FIRST_SPECIAL
        )
    generator = torch.Generator().manual_seed(0)
    low = min(10, max(limit - 2 * TOKENS, 0))
    order = [torch.randperm(limit - low, generator=generator)[:TOKENS] for _ in range(BATCH)]
    return low + torch.stack(order)


PLACEHOLDERS = re.compile(r"(\w+) (?:features|placeholder).*do not match.*features:?\s*(\d+)", re.S)


def _run_with_placeholders(model: nn.Module, inputs: dict, placed: tuple = ()) -> dict:
    """Run; where the model counts placeholder tokens, give it as many as it says it needs.

    What it says is a number of features, or of all their elements.
    """
    try:
        _run(model, inputs)
        return inputs
    except (ValueError, RuntimeError) as error:
        found = PLACEHOLDERS.search(str(error))
        kind = found[1].lower() if found else ""
        if not found or "input_ids" not in inputs or kind in placed:
            raise
    failure: Exception | None = None
    for width in (1, *_widths(model)):
        count, rest = divmod(int(found[2]), width * BATCH)
        if rest or not 0 < count < 600:
            continue
        try:
            marked = _with_placeholders(model, inputs, kind, count)
            return _run_with_placeholders(model, marked, (*placed, kind))
        except Exception as error:
            failure = error
    raise failure or ValueError(f"no number of {kind} tokens fits")


def _run(model: nn.Module, inputs: dict) -> None:
    torch.manual_seed(0)
    with torch.no_grad():
        output = model(**copy.deepcopy(inputs))
    found = tensors_of(output)
    if not found:
        raise ValueError("its output holds no floating tensor")
    if not any(torch.isfinite(t).all() and t.numel() for t in found):
        raise ValueError("no output is finite")


def _widths(model: nn.Module) -> list[int]:
    sizes = (getattr(c, "hidden_size", None) for c in _with_parts(model.config))
    return list(dict.fromkeys(s for s in sizes if isinstance(s, int)))


def _with_placeholders(model: nn.Module, inputs: dict, kind: str, count: int) -> dict:
    """`count` tokens of a kind in every row, and the kind of each token where that is asked for."""
    names = [f"{k}_token_{end}" for k in (kind, "image", "audio") for end in ("id", "index")]
    found = (getattr(model.config, name, None) for name in names)
    token = next(token for token in found if isinstance(token, int))
    ids = inputs["input_ids"]
    marks = torch.full((BATCH, count), token)
    ids = torch.cat((ids[:, :1], marks, ids[:, 1:]), dim=1)
    inputs = {**inputs, "input_ids": ids}
    kinds = {"video": 2, "audio": 3}
    for name in ("mm_token_type_ids", "token_type_ids"):
        if name in inputs:
            inputs[name] = torch.where(ids == token, kinds.get(kind, 1), 0)
    return inputs


# What a next step takes back: the model's own, which a fold may keep in other units.
STATE = ("past_key_values", "cache_params", "state")


def tensors_of(output, depth: int = 6) -> list[torch.Tensor]:
    """Every floating tensor that can be reached from an output, in order."""
    if depth == 0 or isinstance(output, (str, bytes, type, nn.Module)):
        return []
    if isinstance(output, torch.Tensor):
        return [output] if output.is_floating_point() or output.is_complex() else []
    if isinstance(output, dict):
        parts = (value for key, value in output.items() if key not in STATE)
    elif isinstance(output, (tuple, list)):
        parts = output
    else:
        parts = vars(output).values() if hasattr(output, "__dict__") else ()
    return [tensor for part in parts for tensor in tensors_of(part, depth - 1)]
