"""`doctor`: what it finds on this machine and on others, made up; a broken check ends no other."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from flashnorm.cli import app
from flashnorm.doctor import Row, checks, kernels, machine, probe, settings, software
from flashnorm.kernels.cpu import calls, library
from tests.kernels.cases import compiled


def rows_of(check) -> dict[str, Row]:
    return {row.name: row for row in check()}


def given(monkeypatch, *rows: Row) -> None:
    monkeypatch.setattr("flashnorm.doctor.examine", lambda: iter(rows))


def test_every_row_of_this_machine(monkeypatch):
    """The whole command once, in this process."""
    result = CliRunner().invoke(app, ["doctor", "--json"])
    data = json.loads(result.stdout)
    found = {(row["group"], row["name"]): row for row in data["rows"]}
    assert found["packages", "torch"]["found"] == torch.__version__
    assert found["machine", "cores"]["state"] == "ok"
    assert not [row for row in data["rows"] if "cannot be told" in row["found"]]
    assert (result.exit_code == 0) is data["ok"]
    assert data["ok"] is not any(row["state"] == "broken" for row in data["rows"])


@pytest.mark.parametrize(("state", "code"), [("ok", 0), ("missing", 0), ("note", 0), ("broken", 1)])
def test_only_what_is_broken_makes_the_exit_code_one(state, code, monkeypatch):
    given(monkeypatch, Row("a", "b", "it is so", state, "pip install it"))
    result = CliRunner().invoke(app, ["doctor"])
    assert result.exit_code == code
    assert "it is so" in result.stdout
    assert "→ pip install it" in result.stdout
    assert ("does not work here" in result.stdout) == (code == 1)


@pytest.mark.parametrize(("needed", "state"), [(True, "broken"), (False, "note")])
def test_a_check_that_fails_is_a_row_and_the_others_go_on(needed, state, monkeypatch):
    def failing():
        yield Row("a", "first", "fine")
        raise ZeroDivisionError("by\nzero")

    some = (
        checks.Check("a", "failing", failing, needed),
        checks.Check("a", "after", lambda: [Row("a", "after", "fine")]),
    )
    monkeypatch.setattr(machine, "CHECKS", some)
    for module in (kernels, software, settings):
        monkeypatch.setattr(module, "CHECKS", ())
    first, failed, after = checks.examine()
    assert failed == Row("a", "failing", "cannot be told: ZeroDivisionError: by", state)
    assert (first.state, after.state) == ("ok", "ok")


def test_it_works_where_torch_and_transformers_do_not_import(tmp_path):
    """Where they raise at import: rows, exit code 1, and nothing written."""
    for name in ("torch", "transformers"):
        (tmp_path / f"{name}.py").write_text("raise RuntimeError('broken on purpose')\n")
    before = sorted(tmp_path.rglob("*"))
    paths = os.pathsep.join([str(tmp_path), str(Path(checks.__file__).parents[2])])
    done = subprocess.run(
        [sys.executable, "-m", "flashnorm", "doctor", "--json"],
        env={**os.environ, "PYTHONPATH": paths, "PYTHONDONTWRITEBYTECODE": "1"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=180,
    )
    assert done.returncode == 1, done.stderr
    assert "Traceback" not in done.stderr
    rows = json.loads(done.stdout)["rows"]
    broken = {row["name"]: row["found"] for row in rows if row["state"] == "broken"}
    assert "broken on purpose" in broken["library"]
    assert "broken on purpose" in broken["import torch"]
    assert {"python", "memory"} <= {row["name"] for row in rows if row["state"] == "ok"}
    assert sorted(tmp_path.rglob("*")) == before


# The machine


@pytest.fixture
def system(tmp_path, monkeypatch):
    """Another machine's files: call with paths and their texts."""
    monkeypatch.setattr(machine, "SYSTEM", tmp_path)

    def lay(files: dict[str, str]) -> None:
        for name, text in files.items():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text(text)

    return lay


def test_caches(system):
    place = "sys/devices/system/cpu/cpu0/cache"
    for i, texts in enumerate((("1", "Data", "48K"), ("1", "Instruction", "32K"))):
        names = ("level", "type", "size")
        system({f"{place}/index{i}/{n}": f"{t}\n" for n, t in zip(names, texts, strict=True)})
    assert rows_of(machine._caches)["caches"].found == "L1 48K"


@pytest.mark.parametrize(
    ("files", "cores"),
    [
        ({"proc/self/cgroup": "0::/a/b\n", "sys/fs/cgroup/a/cpu.max": "150000 100000\n"}, 1.5),
        (
            {
                "proc/self/cgroup": "0::/a\n",
                "sys/fs/cgroup/a/cpu.max": "max 100000\n",
                "sys/fs/cgroup/cpu.max": "400000 100000\n",
            },
            4,
        ),
        (
            {
                "proc/self/cgroup": "4:cpu,cpuacct:/x\n",
                "sys/fs/cgroup/cpu/x/cpu.cfs_quota_us": "50000\n",
                "sys/fs/cgroup/cpu/x/cpu.cfs_period_us": "100000\n",
            },
            0.5,
        ),
        (
            {
                "proc/self/cgroup": "4:cpu:/\n",
                "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1\n",
                "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
            },
            None,
        ),
        ({"proc/self/cgroup": "0::/\n"}, None),
        ({}, None),
    ],
    ids=["version 2", "a parent's", "version 1", "version 1 without", "no file", "no groups"],
)
def test_the_limit_of_a_control_group(files, cores, system):
    system(files)
    assert machine.core_limit() == cores


@pytest.mark.parametrize(
    ("text", "limit"), [("3000000000", 3_000_000_000), ("max", None), (str(2**63), None)]
)
def test_memory_and_its_limit(text, limit, system):
    meminfo = "MemTotal:  8000000 kB\nMemAvailable:  2000000 kB\n"
    group = {"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/memory.max": text}
    system({"proc/meminfo": meminfo, **group})
    assert machine.memory_limit() == limit
    found = rows_of(machine._memory)["memory"].found
    assert "8.2 GB, 2.0 GB of it free" in found
    assert ("at most 3.0 GB" in found) is (limit is not None)


def test_more_threads_than_cores_is_noted(monkeypatch):
    monkeypatch.setattr(machine, "core_limit", lambda: 1.5)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
    row = rows_of(machine._threads)["torch"]
    assert (row.state, row.mend) == ("note", "export OMP_NUM_THREADS=1")
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    assert rows_of(machine._threads)["torch"].state == "ok"


@pytest.mark.parametrize(
    ("names", "state"),
    [(["libgomp-a34b.so.1"], "ok"), (["libgomp.so.1", "libiomp5.so"], "note"), ([], "note")],
)
def test_openmp_runtimes(names, state, system):
    lines = [f"7f00-7f01 r-xp 0 08:01 1 /usr/lib/{name}" for name in [*names, "libcomputer.so"]]
    system({"proc/self/maps": "\n".join(lines)})
    row = rows_of(machine._openmp)["OpenMP"]
    assert row.state == state
    assert all(name in row.found for name in names)


def test_a_card_that_torch_cannot_use(system, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert rows_of(machine._cards)["NVIDIA"].found == "no card"
    system({"proc/driver/nvidia/version": "590"})
    monkeypatch.setattr(torch.version, "cuda", None)
    row = rows_of(machine._cards)["NVIDIA"]
    assert (row.state, row.mend) == ("missing", "pip install --force-reinstall torch")


# The kernels


@compiled
def test_the_self_test_finds_the_kernels_right():
    found = probe.probe()
    assert found["wrong"] == {isa: [] for isa in found["supported"]}
    assert found["used"] in found["supported"]


@compiled
@pytest.mark.parametrize("spoiled", [0.01, float("nan")])
def test_the_self_test_finds_a_wrong_product(spoiled, monkeypatch):
    """A hundredth of one element's size is more than rounding in float32."""
    whole = calls.run

    def wrong(call):
        y = whole(call)
        y[0][0, 0] += spoiled * y[0].abs().mean()
        return y

    monkeypatch.setattr(calls, "run", wrong)
    found = probe.probe()
    assert all(any("float32" in what for what in faults) for faults in found["wrong"].values())
    rows = {row.name: row for row in kernels._rows(found)}
    assert rows["self-test"].state == "broken"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_bound_lets_the_reference_pass_and_a_lost_gain_not(dtype):
    from flashnorm.kernels import reference

    call = probe._call(3, dtype)
    assert probe.excess(call, reference.norm_linear(call)[0]) <= 1
    assert probe.excess(call, reference.norm_linear(call._replace(gain=None))[0]) > 1


def test_kernels_that_are_missing_are_not_broken(monkeypatch, tmp_path):
    monkeypatch.setattr(library, "PATH", tmp_path / "none.so")
    monkeypatch.setattr(kernels.shutil, "which", lambda name: None)
    (row,) = kernels._kernels()
    assert row.state == "missing"
    assert row.mend.startswith("install a C++17 compiler (on Debian: apt-get install g++), then")
    monkeypatch.setattr(kernels.shutil, "which", lambda name: f"/usr/bin/{name}")
    (row,) = kernels._kernels()
    assert row.mend == "pip install --force-reinstall --no-deps flashnorm --no-binary flashnorm"


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ({"FLASHNORM_CPU_LIBRARY": "{file}"}, "the compiled kernels do not load"),
        ({"FLASHNORM_CPU_ISA": "avx9"}, "no 'avx9' kernels in this build or CPU"),
    ],
)
@compiled
def test_kernels_that_do_not_load_are_broken(setting, words, monkeypatch, tmp_path):
    (tmp_path / "text.so").write_text("no library")
    for name, value in setting.items():
        monkeypatch.setenv(name, value.format(file=tmp_path / "text.so"))
    row = rows_of(kernels._kernels)["self-test"]
    assert row.state == "broken"
    assert words in row.found


def test_kernels_that_end_the_process_are_broken(monkeypatch, tmp_path):
    (tmp_path / "_cpu.so").write_text("")
    monkeypatch.setattr(library, "PATH", tmp_path / "_cpu.so")
    died = subprocess.CompletedProcess([], -4, "", "")
    monkeypatch.setattr(kernels, "_probe", lambda: died)
    row = rows_of(kernels._kernels)["self-test"]
    assert (row.state, row.found) == ("broken", "the kernels end the process: SIGILL")
    assert "FLASHNORM_CPU_ISA=portable" in row.mend


def test_a_forced_instruction_set_is_noted(monkeypatch):
    found = {"built": ["amx", "avx2", "portable"], "supported": ["avx2", "portable"]}
    monkeypatch.delenv("FLASHNORM_CPU_ISA", raising=False)
    (row,) = kernels._instruction_sets({**found, "used": "avx2"})
    assert (row.state, "not amx" in row.found) == ("ok", True)
    monkeypatch.setenv("FLASHNORM_CPU_ISA", "portable")
    (row,) = kernels._instruction_sets({**found, "used": "portable"})
    assert (row.state, row.mend) == ("note", "unset FLASHNORM_CPU_ISA")


def test_tuning(monkeypatch, tmp_path):
    from flashnorm.kernels.cpu import crossovers

    monkeypatch.setenv("FLASHNORM_CPU_CACHE", str(tmp_path / "cpu.json"))
    crossovers.forget()
    assert rows_of(kernels._tuned)["tuning"].mend == "flashnorm tune"
    crossovers.store("avx2", {"float32 wide": crossovers.Crossover(4, 64, "measured")})
    row = rows_of(kernels._tuned)["tuning"]
    assert (row.state, "measured for avx2" in row.found) == ("ok", True)
    monkeypatch.setenv("FLASHNORM_CPU_CACHE", "off")
    assert "=off" in rows_of(kernels._tuned)["tuning"].found
    crossovers.forget()


# Packages and settings


@pytest.fixture
def asked(monkeypatch):
    """What the package requires, and what is installed, made up."""
    wanted = ["torch>=2.11", 'plots>=3; extra == "bench"', 'pytest; extra == "test"']
    wanted += ['elsewhere; sys_platform == "nowhere"']
    monkeypatch.setattr(software.metadata, "requires", lambda name: wanted)

    def have(**versions: str) -> None:
        def version(name: str) -> str:
            if name not in versions:
                raise metadata.PackageNotFoundError(name)
            return versions[name]

        monkeypatch.setattr(software.metadata, "version", version)

    return have


def test_what_is_required_and_what_an_extra_brings(asked):
    asked(torch="2.13.0")
    assert [row.state for row in software._required()] == ["ok"]
    (row,) = software._extras()
    assert (row.state, row.mend) == ("missing", 'pip install "flashnorm[bench]"')
    asked(torch="2.10", plots="2")
    (row,) = software._required()
    assert (row.state, row.found) == ("broken", "2.10 is not >=2.11")
    assert row.mend == "pip install torch>=2.11"
    (row,) = software._extras()
    assert row.state == "note"
    asked()
    (row,) = software._required()
    assert row.state == "broken"


def test_engines(asked):
    asked(vllm="0.30")
    rows = rows_of(software._engines)
    assert (rows["vllm"].state, rows["vllm"].found[:4]) == ("ok", "0.30")
    assert (rows["sglang"].state, rows["sglang"].mend) == ("missing", "pip install sglang")


def test_variables_that_are_set(monkeypatch):
    monkeypatch.setenv("FLASHNORM_CPU_ISA", "avx2")
    monkeypatch.setenv("FLASHNORM_CPU_IAS", "avx2")
    rows = rows_of(settings._settings)
    assert rows["FLASHNORM_CPU_ISA"].state == "note"
    assert rows["FLASHNORM_CPU_IAS"].found == "flashnorm reads no such variable"
    assert rows["FLASHNORM_CPU_IAS"].mend == "is FLASHNORM_CPU_ISA meant?"
