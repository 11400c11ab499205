"""A Python in which packages are as if they were not installed, whatever this environment has.

`python -m tests.packaging.absent NAMES FILE [ARGUMENTS]` runs a program so; NAMES are separated by
commas.
"""

from __future__ import annotations

import runpy
import sys
from collections.abc import Collection
from typing import Any

# What `pip install flashnorm` does not bring, and what these bring in turn.
EXTRAS = (
    "transformers", "tokenizers", "huggingface_hub", "rich", "typer", "click", "filelock", "gguf",
    "accelerate", "sentencepiece", "matplotlib", "lm_eval", "peft", "torchao", "bitsandbytes",
    "compressed_tensors",
)  # fmt: skip


class Without:
    """A finder of modules that finds nothing of some packages."""

    def __init__(self, finder: Any, names: Collection[str]) -> None:
        self.finder, self.names = finder, names

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name.partition(".")[0] in self.names:
            return None
        return self.finder.find_spec(name, path, target)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.finder, name)


def hide(names: Collection[str]) -> None:
    """From now on, and for what was not imported yet."""
    loaded = {name.partition(".")[0] for name in sys.modules} & {*names}
    assert not loaded, f"imported before they are hidden: {loaded}"
    sys.meta_path[:] = [Without(finder, names) for finder in sys.meta_path]


if __name__ == "__main__":
    hide(sys.argv[1].split(","))
    sys.argv[:] = sys.argv[2:]
    sys.path.insert(0, "")
    runpy.run_path(sys.argv[0], run_name="__main__")
