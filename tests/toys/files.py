"""`python -m tests.toys.files NAME`: the files that a newcomer had to change.

Its own, and whatever file of the package knows a name that it brings.
"""

import re
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
# Names of a newcomer that the package does not know otherwise.
BROUGHT = {
    "mean_norm": ("mean_norm", '"absmean"'),
    "sign_weights": ("sign_weights", '"signs"', "SIGNS"),
    "numpy_backend": ("numpy_backend", "NumpyBackend"),
}


def changed(name: str) -> list[str]:
    own = ROOT / f"tests/toys/{name}.py"
    found = [own]
    pattern = re.compile("|".join(re.escape(word) for word in BROUGHT[name]))
    for file in sorted((ROOT / "flashnorm").rglob("*.py")):
        if pattern.search(file.read_text("utf-8")):
            found.append(file)
    return [str(file.relative_to(ROOT)) for file in found]


if __name__ == "__main__":
    print("\n".join(changed(sys.argv[1])))
