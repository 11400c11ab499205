"""A program under `flashnorm run`: its models are accelerated as transformers loads them.

Nothing here may break the program. What goes wrong with a model is written down with it, and the
model is as transformers loaded it. The one error on purpose is for an adapter on a folded base.
"""

from __future__ import annotations

import atexit
import json
import os
import threading
from collections import Counter
from functools import wraps
from pathlib import Path
from typing import Any

from flashnorm.engines.run import SETTINGS, Settings
from flashnorm.errors import FlashNormError

ADAPTER = (
    "an adapter is put onto a base that `flashnorm run --fold` folded, and it belongs to the "
    "original one: run without --fold"
)


class Program:
    """The models of this process, and where its notes are written."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.models: list[dict[str, Any]] = []
        self.lock = threading.RLock()
        self.forked()
        atexit.register(self.write)
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(after_in_child=self.forked)

    def forked(self) -> None:
        """A child starts with its parent's models, which the parent's notes have."""
        self.models = []
        self.lock = threading.RLock()
        self.process = os.getpid()

    def take(self, loaded: Any) -> None:
        """Fold and accelerate what a from_pretrained returned, and write down how it went."""
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        try:
            with self.lock:
                self.models.append(_taken(model, self.settings))
                self.write()
        except Exception as error:
            self.models.append({"model": type(model).__name__, "problem": repr(error)})

    def write(self) -> None:
        """The notes so far; a program that is killed leaves them too."""
        if not self.models:
            return
        try:
            from flashnorm.kernels.dispatch import fallbacks

            notes = {"models": self.models, "fallbacks": fallbacks(), "problem": ""}
            place = Path(self.settings.notes, f"{self.process}.json")
            part = place.with_suffix(".part")
            part.write_text(json.dumps(notes), "utf-8")
            part.replace(place)
        except Exception:
            return  # the directory may be gone: the command that made it has ended


def _taken(model: Any, settings: Settings) -> dict[str, Any]:
    from flashnorm.compat.transformers_names import name_or_path
    from flashnorm.engines.loaded import in_words
    from flashnorm.rewrite import fold_
    from flashnorm.runtime import accelerate_, acceleration
    from flashnorm.runtime.accelerate import RECORD
    from flashnorm.undo import UNDO

    note = {"model": type(model).__name__, "source": str(name_or_path(model.config))}
    problem = ""
    if RECORD not in vars(model):  # the program may do so itself, by FlashNormConfig
        try:
            if settings.fold:
                fold_(model)
            accelerate_(model, package=settings.package)
        except Exception as error:
            problem = in_words(error)
    if RECORD not in vars(model):
        done = " (its gains are folded)" if UNDO in vars(model) else ""
        return {**note, "problem": problem + done}
    found = acceleration(model)
    reasons = Counter(part.reason for part in found.parts if part.reason)
    return {
        **note,
        "problem": "",
        "modules": len(found.parts),
        "fused": len(found.fused),
        "kernels": found.kernels,
        "folded": UNDO in vars(model),
        "attention": found.attention,
        "reasons": dict(reasons),
        "acceleration": found.to_json(),
    }


_program: Program | None = None


def program() -> Program:
    """This process under `flashnorm run`."""
    global _program
    if _program is None:
        _program = Program(Settings.read(os.environ[SETTINGS]))
    return _program


def seen(module: Any) -> None:
    """A module that the program waited for has run: put our steps after, or before, its own."""
    if hasattr(module, "PreTrainedModel"):
        _after_loading(module.PreTrainedModel)
    elif hasattr(module, "BaseTuner") and program().settings.fold:
        _before_adapters(module.BaseTuner)


def _after_loading(loaded_class: Any) -> None:
    load = loaded_class.from_pretrained.__func__

    @wraps(load)
    def from_pretrained(cls: Any, *args: Any, **kwargs: Any) -> Any:
        loaded = load(cls, *args, **kwargs)
        program().take(loaded)
        return loaded

    loaded_class.from_pretrained = classmethod(from_pretrained)


def _before_adapters(tuner: Any) -> None:
    from flashnorm.undo import UNDO

    begin = tuner.__init__

    @wraps(begin)
    def __init__(self: Any, model: Any, *args: Any, **kwargs: Any) -> None:
        if any(UNDO in vars(part) for part in model.modules()):
            raise FlashNormError(ADAPTER)
        begin(self, model, *args, **kwargs)

    tuner.__init__ = __init__
