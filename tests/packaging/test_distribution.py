"""What is in the sdist and the wheel, what they say of themselves, and what they ask for."""

from __future__ import annotations

import ast
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from email import message_from_bytes
from pathlib import Path

import pytest

import flashnorm
from flashnorm import extras
from tests.kernels import neon
from tests.test_architecture import FILES, PACKAGE, module_name

ROOT = PACKAGE.parent
tomllib = pytest.importorskip("tomllib", reason="Python 3.10 reads no TOML")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
DEPENDENCIES, EXTRAS = PROJECT["dependencies"], PROJECT["optional-dependencies"]
# What comes with a package that is declared.
BROUGHT = {
    "huggingface_hub": "transformers",
    "tokenizers": "transformers",
    "triton": "torch",
    "datasets": "lm_eval",
}
# Programs that have flashnorm in them, or beside them: whoever uses them has them.
FOREIGN = {"vllm", "sglang", "openvino", "openvino_genai", "llama_cpp", "torchao"}


def name_of(requirement: str) -> str:
    return re.split(r"[\[<>=!~; ]", requirement, maxsplit=1)[0]


def imported(tree: ast.AST) -> set[str]:
    """The packages that a file imports, in functions and for types too."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {name.name.partition(".")[0] for name in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module.partition(".")[0])
    return found - {"flashnorm", "__future__"} - sys.stdlib_module_names


def undeclared(names: set[str]) -> set[str]:
    declared = {name_of(one) for one in (*DEPENDENCIES, *(r for e in EXTRAS.values() for r in e))}
    return {n for n in names if BROUGHT.get(n, n) not in declared and n not in FOREIGN}


@pytest.mark.parametrize("file", FILES, ids=module_name)
def test_every_import_is_a_dependency_or_an_extra(file):
    assert undeclared(imported(ast.parse(file.read_text("utf-8")))) == set()


def test_an_import_that_nobody_declared_is_seen():
    tree = ast.parse("import scipy.linalg, os\ndef f():\n    from einops import rearrange")
    assert undeclared(imported(tree)) == {"scipy", "einops"}


def test_versions_of_the_extra_are_those_that_are_asked_for():
    asked = dict(re.fullmatch(r"(\w+)>=([\d.]+)", one).groups() for one in EXTRAS["hf"])
    assert asked == {
        name: ".".join(map(str, oldest)).removesuffix(".0") for name, oldest in extras.HF.items()
    }


@pytest.mark.parametrize("extra", ["gguf", "bench", "eval"])
def test_what_needs_models_by_name_brings_the_extra_for_them(extra):
    assert "flashnorm[hf]" in EXTRAS[extra]


def test_the_version_is_said_once():
    assert "version" not in PROJECT
    assert PROJECT["dynamic"] == ["version"]
    said = re.search(r"^version: (.+)$", (ROOT / "CITATION.cff").read_text("utf-8"), re.MULTILINE)
    assert said[1] == flashnorm.__version__


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> Path:
    """The repository as git has it, with what work leaves in it."""
    if not (ROOT / ".git").exists() or shutil.which("git") is None:
        pytest.skip("no repository of git")
    target = tmp_path_factory.mktemp("sources")
    listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(listed, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in filter(None, names.split("\0")):
        if (ROOT / name).is_file():  # one that is removed, or a link to a directory, is not
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, target / name)
    for left in LEFT_BY_WORK:
        (target / left).parent.mkdir(parents=True, exist_ok=True)
        (target / left).write_text("left by work")
    return target


LEFT_BY_WORK = (
    "build/lib/flashnorm/old.py",
    "demo-output/model/config.json",
    "flashnorm/__pycache__/old.cpython-311.pyc",
    "flashnorm/kernels/cpu/_cpu.so",
    "tests/__pycache__/old.cpython-311.pyc",
    ".venv/pyvenv.cfg",
    ".hypothesis/examples/one",
    ".mypy_cache/one.json",
)


def built(sources: Path, kind: str, target: Path, **environment: str) -> Path:
    code = f"from setuptools import build_meta; print(build_meta.build_{kind}({str(target)!r}))"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=sources,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return target / done.stdout.splitlines()[-1]


@pytest.fixture(scope="module")
def sdist(sources, tmp_path_factory) -> Path:
    """The sdist, unpacked."""
    target = tmp_path_factory.mktemp("sdist")
    with tarfile.open(built(sources, "sdist", target)) as packed:
        packed.extractall(target)
    return target / f"flashnorm-{flashnorm.__version__}"


def test_the_sdist_is_complete_and_holds_nothing_that_was_built(sources, sdist):
    names = {str(f.relative_to(sdist)) for f in sdist.rglob("*") if f.is_file()}
    made = {"PKG-INFO", "setup.cfg", *(n for n in names if n.startswith("flashnorm.egg-info/"))}
    files = {str(f.relative_to(sources)) for f in sources.rglob("*") if f.is_file()}
    expected = {
        n for n in files if n not in LEFT_BY_WORK and not n.startswith("flashnorm.egg-info")
    }
    assert names - made == expected - {".gitignore"}
    assert {"LICENSE", "README.md", "CITATION.cff", "flashnorm/kernels/cpu/csrc/api.h"} <= names


@pytest.fixture(scope="module")
def wheel(sdist, tmp_path_factory) -> Path:
    """A wheel of the sdist without kernels, which is of every platform then."""
    return built(sdist, "wheel", tmp_path_factory.mktemp("wheel"), FLASHNORM_NO_KERNELS="1")


def test_the_wheel_has_the_package_and_its_data_and_no_tests(sdist, wheel):
    with zipfile.ZipFile(wheel) as packed:
        names = {n for n in packed.namelist() if ".dist-info/" not in n}
    files = [f.relative_to(sdist) for f in (sdist / "flashnorm").rglob("*") if f.is_file()]
    assert names == {str(f) for f in files if "csrc" not in f.parts and f.name != ".gitignore"}
    assert {"flashnorm/py.typed", "flashnorm/data/founding_documents.txt"} <= names


def test_the_wheel_says_what_it_is(wheel):
    with zipfile.ZipFile(wheel) as packed:
        (file,) = (n for n in packed.namelist() if n.endswith(".dist-info/METADATA"))
        metadata = message_from_bytes(packed.read(file))
        (entries,) = (n for n in packed.namelist() if n.endswith("entry_points.txt"))
        commands = packed.read(entries).decode()
    assert metadata["Version"] == flashnorm.__version__
    assert metadata["License-Expression"] == "Apache-2.0"
    assert {"hf", "gguf", "bench", "eval"} <= set(metadata.get_all("Provides-Extra"))
    core = {name_of(r) for r in metadata.get_all("Requires-Dist") if "extra ==" not in r}
    assert {"torch", "safetensors"} <= core
    assert core & extras.HF.keys() == set()
    assert "Paper, https://arxiv.org/abs/2407.09577" in metadata.get_all("Project-URL")
    assert "flashnorm = flashnorm.__main__:main" in commands


@pytest.mark.parametrize(
    ("platform", "expected"),
    [
        ("linux-x86_64", "x86_64"),
        ("linux-aarch64", "aarch64"),
        ("macosx-11.0-arm64", "arm64"),
        ("win-amd64", "amd64"),
    ],
)
def test_the_target_of_a_build_is_what_its_platform_says(platform, expected):
    made = neon.recipe()
    assert made["machine"](platform) == expected
    assert made["SETS"][expected]


def test_the_environment_of_the_tests_has_what_is_declared():
    """The extras that `make venv` installs; what is only for some systems is left out."""
    for one in (*DEPENDENCIES, *EXTRAS["hf"]):
        assert importlib.metadata.version(name_of(one))
