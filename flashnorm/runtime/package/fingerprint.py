"""All that a compiled step depends on, as texts that can be compared and shown."""

from __future__ import annotations

import hashlib
import inspect
import json
import sys
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import nn

import flashnorm
from flashnorm.kernels.backend import Packaging
from flashnorm.runtime.package.options import Package
from flashnorm.runtime.package.still import read_by
from flashnorm.runtime.watch import is_plain

_OURS = ("kernels", "runtime", "functional", "integrations")  # whose code is in a trace
_LIBRARIES = ("torch", "transformers", "flashnorm")
_SAYS_NOTHING = frozenset(nn.Module().__dict__) - {"training"}
_SAYS_NOTHING |= {"name_or_path", "warnings_issued"}  # where a model is from


def fingerprint(model: Any, options: Package, packaging: Packaging) -> dict[str, str]:
    """What has to be the same for a package to stand for the decode step of a model."""
    transformers = sys.modules["transformers"]
    return {
        "torch": str(torch.__version__),
        "transformers": str(transformers.__version__),
        "flashnorm": f"{flashnorm.__version__}, sources {_own_sources()}",
        **packaging.described(),
        "dtype": str(model.dtype),
        "batch": str(options.batch),
        "length": str(options.length),
        "config": _short(_config(model.config)),
        "modules": _short(
            [_module(path, part, vars(part)) for path, part in model.named_modules() if path]
            + [_module("", model, {name: vars(model)[name] for name in read_by(model)})]
        ),
        "code": _short([_source(name) for name in _foreign(model)]),
    }


def name(found: dict[str, str], options: Package) -> str:
    """The directory of such a package."""
    return f"decode-b{options.batch}-t{options.length}-{_short(found)}"


def _short(what: Any) -> str:
    text = json.dumps(what, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _config(config: Any) -> list[Any]:
    """Every setting of a config and of those inside, private ones too, but for where it is from."""
    inner = [getattr(config, name, None) for name in config.sub_configs]
    held = {k: str(v) for k, v in vars(config).items() if k != "_name_or_path"}
    return [held, *[_config(part) for part in inner if part is not None]]


def _module(path: str, module: nn.Module, held: dict[str, Any]) -> list[Any]:
    kind = type(module)
    plain = {k: v for k, v in held.items() if k not in _SAYS_NOTHING and is_plain(v)}
    other = {k: _shown(v) for k, v in held.items() if k not in _SAYS_NOTHING and k not in plain}
    tensors = [
        (name, None if p is None else (str(p.dtype), tuple(p.shape), p.stride()))
        for table in (module._parameters, module._buffers)
        for name, p in table.items()
    ]
    shown = {k: repr(v) for k, v in plain.items()}
    return [path, f"{kind.__module__}.{kind.__qualname__}", shown, other, tensors]


def _shown(value: Any) -> str:
    """A value that is not plain, by what it is and not by where."""
    kernel = getattr(value, "kernel", None)
    packed = [] if kernel is None else kernel.formats()
    kind = value if callable(value) and hasattr(value, "__qualname__") else type(value)
    text = f"{kind.__module__}.{kind.__qualname__}"
    return text if kernel is None else f"{text} {kernel.written} {packed} {value.dtypes}"


def _foreign(model: nn.Module) -> list[str]:
    """The files of classes that no version number stands for."""
    names = {kind.__module__ for part in model.modules() for kind in type(part).__mro__}
    known = (*_LIBRARIES, "builtins", "typing", "abc", "collections")
    return sorted(name for name in names if name.partition(".")[0] not in known)


def _source(module: str) -> str:
    try:
        return inspect.getsource(sys.modules[module])
    except (KeyError, OSError, TypeError):
        return module


@cache
def _own_sources() -> str:
    """A version number does not change with every line of ours."""
    root, digest = Path(flashnorm.__file__).parent, hashlib.sha256()
    for folder in _OURS:
        for file in sorted((root / folder).rglob("*.py")):
            digest.update(file.read_bytes())
    return digest.hexdigest()[:16]
