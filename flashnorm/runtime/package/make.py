"""From a model to a forward with a package: found in its directory, or made there; then checked."""

from __future__ import annotations

import logging
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from flashnorm.compat.torch_names import PackageRunner
from flashnorm.compat.transformers_names import fixed_layer
from flashnorm.errors import FlashNormError
from flashnorm.kernels import dispatch
from flashnorm.kernels.backend import Packaging
from flashnorm.runtime.bound import Kernel
from flashnorm.runtime.forwards import Fused
from flashnorm.runtime.laid import plain_parts
from flashnorm.runtime.package import store
from flashnorm.runtime.package.arguments import Given
from flashnorm.runtime.package.caches import Shapes
from flashnorm.runtime.package.compiled import LIBRARY, compile_, trace
from flashnorm.runtime.package.fingerprint import fingerprint, name
from flashnorm.runtime.package.forward import Inputs, Packaged
from flashnorm.runtime.package.options import Package
from flashnorm.runtime.package.store import Description

SHORT = 2  # tokens of a cache that the model's own steps are compared on

_log = logging.getLogger("flashnorm")


def packaged(model: nn.Module, options: Package) -> tuple[Packaged, Path]:
    """A forward for an accelerated model, that is not yet in its place, and where its library is.

    Raises FlashNormError where the model cannot be packaged, where what is in the directory cannot
    be used, or where it does not compute what the model does.
    """
    packaging = _packaging(model)
    cache, output, positions = _probe(model, options)
    shapes = Shapes(cache.layers)
    described = fingerprint(model, options, packaging)
    place = Path(options.directory).expanduser().absolute() / name(described, options)
    found = store.read(place, described)
    if found is None:
        _make(model, cache, options, packaging, described, place)
        found = store.read(place, described)
        assert found is not None
    packaging.expose()
    start = time.perf_counter()
    try:
        runner = PackageRunner(str(place / LIBRARY), 1)
        forward = Packaged(model, runner.run, found.names, shapes, output, positions)
    except (RuntimeError, KeyError, AttributeError) as error:
        raise FlashNormError(f"the package {place} does not load: {error}") from error
    _check(model, forward, options, place)
    _log.info("loaded the decode step of %s in %.2f s", place, time.perf_counter() - start)
    return forward, place


def _packaging(model: nn.Module) -> Packaging:
    """How the model's backend is called from a library. Raises FlashNormError where it is not."""
    transformers = sys.modules.get("transformers")
    if not transformers or not isinstance(model, transformers.PreTrainedModel):
        raise FlashNormError("only models from transformers can be packaged")
    if model.config.is_encoder_decoder or not model.can_generate():
        raise FlashNormError("only models that continue text can be packaged: decoders")
    if "forward" in vars(model):
        raise FlashNormError("the model's forward was replaced, so that it cannot be packaged")
    packaging = dispatch.backend_of(*model.parameters()).packaging
    reason = packaging if isinstance(packaging, str) else packaging.why_not()
    if not reason:
        reason = next((_hooked(path) for path, m in model.named_modules() if _hooks(m)), "")
    if not reason and any(m.training for m in model.modules()):
        reason = "it is in training; call model.eval() first"
    if reason:
        raise FlashNormError(f"the model cannot be packaged: {reason}")
    assert isinstance(packaging, Packaging)
    return packaging


def _hooks(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks)


def _hooked(path: str) -> str:
    return f"{path or 'it'} has hooks"


def _probe(model: Any, options: Package) -> tuple[Any, type, bool]:
    """A cache after one token, what the model returns, and whether it counts positions itself.

    Raises FlashNormError where the cache, or what the model returns, is not what a step has.
    """
    before = [dict(vars(m)) for m in model.modules()]
    cache = _begun(model, options, options.length)
    kinds = {type(layer) for layer in cache.layers} - {fixed_layer()}
    if kinds:
        names = ", ".join(sorted(kind.__name__ for kind in kinds))
        raise FlashNormError(
            f"the model cannot be packaged: layers of its cache are {names}, and a package has "
            "attention to all earlier tokens only"
        )
    if any(not layer.is_initialized for layer in cache.layers):
        raise FlashNormError("the model cannot be packaged: a layer of its cache is not used")
    counted, given = (_begun(model, options, SHORT) for _ in range(2))
    ids, positions = _ids(options, 0), _ids(options, 1)
    found = _own_step(model, ids, counted, None)
    same = _own_step(model, ids, given, positions)
    if [dict(vars(m)) for m in model.modules()] != before:
        raise FlashNormError("the model cannot be packaged: its forward stores attributes")
    if set(found) != {"logits", "past_key_values"} or found.past_key_values is not counted:
        raise FlashNormError(
            f"the model cannot be packaged: it returns {', '.join(found)}, not logits and a cache"
        )
    return cache, type(found), torch.equal(found.logits, same.logits)


def _begun(model: Any, options: Package, length: int) -> Any:
    """A cache of this length after one token."""
    from transformers import StaticCache

    cache = StaticCache(config=model.config, max_cache_len=length)
    _own_step(model, _ids(options, 1), cache, None)
    return cache


def _ids(options: Package, token: int) -> Tensor:
    return torch.full((options.batch, 1), token)


@torch.no_grad()
def _own_step(model: Any, ids: Tensor, cache: Any, positions: Any) -> Any:
    return type(model).forward(
        model,
        input_ids=ids,
        position_ids=positions,
        past_key_values=cache,
        use_cache=True,
        return_dict=True,
    )


def kernels_of(model: nn.Module) -> list[Kernel]:
    """All kernels of an accelerated model."""
    forwards = (vars(module).get("forward") for module in model.modules())
    return [k for forward in forwards if isinstance(forward, Fused) for k in forward.kernels()]


def _make(
    model: nn.Module,
    cache: Any,
    options: Package,
    packaging: Packaging,
    described: dict[str, str],
    place: Path,
) -> None:
    """Trace, compile and write a package."""
    _log.info("compiling the decode step, once: this takes a minute or two (%s)", place)
    start = time.perf_counter()
    layers = cache.layers
    lengths = [layer.cumulative_length for layer in layers]
    keys, values = [layer.keys for layer in layers], [layer.values for layer in layers]
    ids, visible = _ids(options, 0), torch.ones(options.batch, options.length, dtype=torch.bool)
    inputs = (ids, visible, torch.ones_like(ids), lengths, keys, values)
    with store.being_made(place) as made:
        with plain_parts(model, kernels_of(model)):
            traced = trace(model, cache, inputs)
        _log.info("traced in %.0f s; compiling", time.perf_counter() - start)
        flat = [ids, visible, torch.ones_like(ids), *lengths, *keys, *values]
        given = [*(tensor.detach() for tensor in Inputs(model, traced.names).find()), *flat]
        compile_(traced, given, packaging, made / LIBRARY)
        store.write(made, Description(described, traced.names))
    _log.info("compiled in %.0f s", time.perf_counter() - start)


def _check(model: Any, forward: Packaged, options: Package, place: Path) -> None:
    """Raise FlashNormError unless the library's second token is the model's own, but for rounding.

    The fingerprint says that they are the same; this is for what it may not know.
    """
    ids, positions = _ids(options, 2), _ids(options, 1)
    own, other = _begun(model, options, SHORT), _begun(model, options, options.length)
    expected = _own_step(model, ids, own, positions)
    with torch.no_grad():
        found = forward.step(Given(ids, None, positions, other))
    if isinstance(found, str):
        raise FlashNormError(f"the package {place} does not take the model's own step: {found}")
    pairs = [(found.logits, expected.logits)]
    for a, b in zip(other.layers, own.layers, strict=True):
        pairs += [(a.keys[:, :, :SHORT], b.keys), (a.values[:, :, :SHORT], b.values)]
        pairs.append((a.cumulative_length.float(), b.cumulative_length.float()))
    worst = max(_relative(*pair) for pair in pairs)
    # Each layer rounds some eight times; products of n numbers in float32 are off by √n roundings.
    allowed = len(own.layers) * 16 * torch.finfo(expected.logits.dtype).eps
    if not worst <= allowed:
        raise FlashNormError(
            f"the package {place} computes something else than the model: an error of {worst:.1e}, "
            f"where rounding explains {allowed:.1e}; delete it to have it made again"
        )


def _relative(found: Tensor, expected: Tensor) -> float:
    scale = expected.double().abs().max().clamp_min(1e-30)
    return float((found.double() - expected.double()).abs().max() / scale)
