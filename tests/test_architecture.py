"""The shape of the package: imports go one way, files stay small, no model is known by name."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import flashnorm
from flashnorm.compat import ATTRIBUTES
from tests.private_names import defined, private_names

PACKAGE = Path(flashnorm.__file__).parent
ROOT = PACKAGE.parent
FILES = sorted(PACKAGE.rglob("*.py"))

# A module may import what stands before it, and its own layer. An entry is a module, or a package
# with all that is in it.
ORDER = [
    "flashnorm",  # the names of __init__ only: the functions behind them are layers of their own
    "flashnorm.errors",
    "flashnorm.reading",
    "flashnorm.extras",
    "flashnorm.patterns",
    "flashnorm.compat",
    "flashnorm.kernels",
    "flashnorm.quantized",
    "flashnorm.warning",
    "flashnorm.deprecated",
    "flashnorm.paged",
    "flashnorm.plan",
    "flashnorm.algebra",
    "flashnorm.marker",
    "flashnorm.content",
    "flashnorm.transaction",
    "flashnorm.graph",
    "flashnorm.settled",
    "flashnorm.planner",
    "flashnorm.functional",
    "flashnorm.nn",
    "flashnorm.swap",
    "flashnorm.undo",
    "flashnorm.loading",
    "flashnorm.skeleton",
    "flashnorm.gguf",
    "flashnorm.checkpoint",
    "flashnorm.inspection",
    "flashnorm.rewrite",
    "flashnorm.integrations",
    "flashnorm.runtime",
    "flashnorm.adapters",
    "flashnorm.verification",
    "flashnorm.report",
    "flashnorm.demo",
    "flashnorm.bench",
    "flashnorm.html",  # records know it by name alone: flashnorm/paged.py
    "flashnorm.engines",
    "flashnorm.doctor",
    "flashnorm.cli",
    "flashnorm.__main__",
]

NAMES = re.compile(
    r"\b(?:[qkvo]|qkv|gate|up|down|gate_up|in|out)_proj\b"
    r"|\bc_(?:attn|proj|fc)\b|\blm_head\b|\bembed_tokens\b|\bwte\b|\bln_(?:f|\d)\b"
    r"|\w*_layernorm\b|\bself_attn\b"
    r"|\b(?!Flash)[A-Z]\w+RMSNorm\b|\b(?:Llama|Mistral|Gemma|Qwen|Mixtral|Phi|OPT|Falcon|GPT(?!Q))\w+\b"
    r"|\bmodel_type\s*(?:==|!=|in\s*[\[({])"
)
# Operations of torch that look like the name of a layer.
OPERATIONS = {"native_layernorm"}
# What an interface of transformers calls its weights, whatever the model; known to compat alone.
INTERFACE = {"gate_up_proj", "down_proj"}


def module_name(file: Path) -> str:
    parts = file.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(file) for file in FILES}


def layer(module: str) -> int:
    """The place of a module in ORDER."""
    if module in ORDER:
        return ORDER.index(module)
    package = ".".join(module.split(".")[:2])
    if package in ORDER:
        return ORDER.index(package)
    raise AssertionError(f"{module} has no place in ORDER: say which modules it may import")


def imported(tree: ast.AST) -> set[str]:
    """Every module of the package that a file imports, in functions and for types too."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {name.name for name in node.names if name.name.split(".")[0] == "flashnorm"}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports hide the direction"
            if node.module and node.module.split(".")[0] == "flashnorm":
                found |= {target(node.module, name.name) for name in node.names}
        elif isinstance(node, ast.Attribute) and ast.unparse(node.value) == "flashnorm":
            found |= {target("flashnorm", node.attr)} & MODULES
    return found


def target(module: str, name: str) -> str:
    """What `from module import name` imports."""
    if module == "flashnorm" and name in flashnorm._LAZY:
        return flashnorm._LAZY[name]
    full = f"{module}.{name}"
    return full if full in MODULES else module


def violations(module: str, source: str) -> list[str]:
    own = layer(module)
    return [
        f"{module} imports {name}, which comes after it"
        for name in sorted(imported(ast.parse(source)))
        if layer(name) > own
    ]


@pytest.mark.parametrize(
    "file", [f for f in FILES if f != PACKAGE / "__init__.py"], ids=module_name
)
def test_imports_go_one_way(file):
    assert violations(module_name(file), file.read_text("utf-8")) == []


@pytest.mark.parametrize(
    "source",
    [
        "def f():\n    from flashnorm.report import show",
        "import flashnorm\nflashnorm.verify",
        "import flashnorm\nflashnorm.nn",
        "from flashnorm import inspect",
        "import flashnorm.cli.app",
        "from flashnorm import planner",
    ],
)
def test_an_import_against_the_direction_is_seen(source):
    assert violations("flashnorm.graph.flow", source)
    assert not violations("flashnorm.cli.app", source)


def test_every_layer_exists():
    assert set(ORDER) <= MODULES


def test_a_package_is_one_layer():
    """No entry is inside of another one; the root stands for its own names only."""
    inside = {entry for entry in ORDER for other in ORDER[1:] if entry.startswith(f"{other}.")}
    assert inside == set()


@pytest.mark.parametrize("file", FILES, ids=module_name)
def test_files_stay_small(file):
    assert len(file.read_text("utf-8").splitlines()) <= 400


def known_names(source: str) -> list[str]:
    return [name for name in NAMES.findall(source) if name not in OPERATIONS]


@pytest.mark.parametrize("file", FILES, ids=module_name)
def test_no_model_is_known_by_name(file):
    allowed = INTERFACE if module_name(file).startswith("flashnorm.compat") else set()
    assert set(known_names(file.read_text("utf-8"))) <= allowed


@pytest.mark.parametrize(
    "source",
    [
        'name.endswith("q_proj.weight")',
        "layer.input_layernorm",
        "isinstance(module, LlamaRMSNorm)",
        'if config.model_type == "gemma2":',
        'if model_type in ("llama", "mistral"):',
        "transformers.LlamaForCausalLM",
        "model.lm_head",
    ],
)
def test_a_known_name_is_seen(source):
    assert known_names(source)


# Private names of torch and of transformers stand in flashnorm/compat. Of torch, only attributes
# that are read before every kernel may be used by their own names.
COMPAT = [file for file in FILES if file.is_relative_to(PACKAGE / "compat")]
USERS = [file for file in FILES if file not in COMPAT]
ALLOWED = frozenset(row.theirs.rpartition(".")[2] for row in ATTRIBUTES)
INHERITED = frozenset(
    name for file in FILES for name in defined(ast.parse(file.read_text("utf-8")))
)


@pytest.mark.parametrize("file", USERS, ids=module_name)
def test_no_private_name_of_a_library_is_used_outside_compat(file):
    found = private_names(file.read_text("utf-8"), ALLOWED, INHERITED)
    assert found == [], "give it a name and a check: a row in flashnorm/compat"


@pytest.mark.parametrize(
    "source",
    [
        "import torch\ntorch._C._get_tracing_state()",
        "import torch\nif torch._dynamo: pass",
        "import torch as t\nt.nn.modules.conv._ConvNd",
        "from torch import nn\nnn.modules.module._global_forward_hooks",
        "from torch.nn.modules import module as hooks\nhooks._global_forward_hooks",
        "import torch._inductor",
        "from torch import _dynamo",
        "def f():\n    from torch._subclasses.fake_tensor import FakeTensor",
        "from torch.overrides import _get_current_function_mode_stack as stack",
        "import torch\ngetattr(torch, '_GLOBAL_DEVICE_CONTEXT', None)",
        "import torch\ntorch.Tensor._make_subclass",
        "config._attn_implementation = 'sdpa'",
        "part._supports_sdpa and part._can_set_attn_implementation()",
        "hasattr(model, '_init_weights')",
        "type(module)._scaled(module)",  # what is ours elsewhere is not ours on any object
        "from transformers import initialization as i\ni._private",
        "from transformers.core_model_loading import WeightConverter",
        "import transformers.conversion_mapping",
        "self._non_persistent_buffers_set",
        "super()._get_backward_hooks()",
    ],
)
def test_a_private_name_is_seen(source):
    assert private_names(source, ALLOWED, INHERITED)


@pytest.mark.parametrize(
    "source",
    [
        '"""torch._C._get_tracing_state"""',
        "from flashnorm.compat.torch_names import tracing_state\ntracing_state()",
        "import torch\ntorch.nn.functional.linear.__name__",
        "module._parameters['weight']._version",
        "class A:\n    def __init__(self): self._a = 1\n    def b(self): return self.c._a",
        "super()._save_to_state_dict({}, '', False)",
        "self._scaled(x)",
        "call._replace(x=None)",
        "getattr(x, '_flashnorm_recipe', None)",
        "from transformers import AutoConfig\nfrom transformers.utils import logging",
    ],
)
def test_other_names_are_let_be(source):
    assert private_names(source, ALLOWED, INHERITED) == []


def python(code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120
    )
    return done.stdout.strip()


@pytest.mark.parametrize(
    "before", ["", "flashnorm.fold_, flashnorm.graph; import flashnorm.cli.app"]
)
def test_dir_lists_what_can_be_used_and_nothing_else(before):
    """In a new process, before anything was used, and after names and modules were loaded."""
    code = f"import flashnorm, flashnorm.graph.ambient\n{before}\nprint(*dir(flashnorm))"
    listed = python(code).split()
    assert listed == sorted(flashnorm.__all__)
    assert {"fold_", "folding", "inspect", "Plan", "FlashNormError"} < set(listed)
    assert not {"annotations", "import_module", "TYPE_CHECKING", "Any", "graph"} & set(listed)


def test_every_public_name_is_there():
    assert all(getattr(flashnorm, name) is not None for name in dir(flashnorm))
    with pytest.raises(AttributeError, match="module 'flashnorm' has no attribute 'fold'"):
        flashnorm.fold  # noqa: B018


HEAVY = ("torch", "transformers", "triton", "safetensors", "numpy", "rich")


@pytest.mark.parametrize("module", ["flashnorm", "flashnorm.cli"])
def test_importing_loads_nothing_heavy(module):
    heavy = HEAVY if module == "flashnorm" else HEAVY[:-1]
    loaded = python(f"import sys, {module}; print(*sorted(sys.modules))").split()
    assert set(loaded) & set(heavy) == set()


def test_help_loads_nothing_heavy():
    code = (
        "import sys; sys.argv = ['flashnorm', 'fold', '--help']\n"
        "from flashnorm.cli import main\n"
        "try: main()\n"
        "except SystemExit: print('\\nMODULES', *sys.modules)"
    )
    assert set(python(code).rpartition("MODULES")[2].split()) & set(HEAVY[:-1]) == set()


def test_importing_is_fast():
    """Under 150 ms more than torch alone; the best of several, because other work delays some."""
    code = (
        "import time, torch; start = time.perf_counter(); import flashnorm; "
        "print(time.perf_counter() - start)"
    )
    assert min(float(python(code)) for _ in range(3)) < 0.150
