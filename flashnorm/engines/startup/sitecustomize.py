"""Python runs this when it starts under `flashnorm run`: it waits for transformers, no more.

It may run in any Python, with flashnorm or without. So it imports the standard library alone, and
an environment's own sitecustomize runs after it as it would without.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from importlib.util import find_spec, module_from_spec
from types import ModuleType

SETTINGS = "FLASHNORM_RUN"
HERE = os.path.dirname(os.path.abspath(__file__))
WAITED_FOR = ("transformers.modeling_utils", "peft.tuners.tuners_utils")


class _Waiting(MetaPathFinder):
    """Finds the modules of WAITED_FOR where everybody does, and is told when each has run."""

    def __init__(self) -> None:
        self.asked: set[str] = set()

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name not in WAITED_FOR or name in self.asked:
            return None
        self.asked.add(name)
        try:
            spec = find_spec(name)
        finally:
            self.asked.discard(name)
        if spec is not None and spec.loader is not None:
            spec.loader = _Told(spec.loader)
        return spec


class _Told(Loader):
    """A loader as it was, but that flashnorm sees the module once it has run."""

    def __init__(self, loader: Loader) -> None:
        self.loader = loader

    def __getattr__(self, name: str) -> object:
        return getattr(self.loader, name)

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        module.__loader__ = self.loader
        if module.__spec__ is not None:
            module.__spec__.loader = self.loader
        self.loader.exec_module(module)
        _tell(module)


def _tell(module: ModuleType) -> None:
    """Whatever goes wrong here is a line of the summary; the program goes on."""
    try:
        from flashnorm.engines.running import seen
    except Exception as error:
        _note(f"flashnorm cannot be imported by {sys.executable}: {error}")
    else:
        seen(module)


def _note(problem: str) -> None:
    try:
        import json

        notes = json.loads(os.environ[SETTINGS])["notes"]
        with open(os.path.join(notes, f"{os.getpid()}.json"), "w", encoding="utf-8") as file:
            json.dump({"models": [], "fallbacks": {}, "problem": problem}, file)
    except Exception:
        return


def _next() -> None:
    """Run the sitecustomize that this one stands before, if there is one."""
    places = [place for place in sys.path if os.path.abspath(place or os.curdir) != HERE]
    spec = PathFinder.find_spec("sitecustomize", places)
    if spec is not None and spec.loader is not None:
        module = sys.modules["sitecustomize"] = module_from_spec(spec)
        spec.loader.exec_module(module)


if SETTINGS in os.environ:
    sys.meta_path.insert(0, _Waiting())
_next()
