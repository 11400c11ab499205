"""Where one way to multiply takes over from another: decided from times, kept, read, and obeyed."""

from __future__ import annotations

import json

import pytest
import torch
from typer.testing import CliRunner

from flashnorm.cli.app import app
from flashnorm.kernels import dispatch, measurements
from flashnorm.kernels.cpu import crossovers, measure, policy
from flashnorm.kernels.cpu.crossovers import NEVER, Crossover
from flashnorm.kernels.cpu.library import load
from flashnorm.kernels.weights import DTYPES
from tests.kernels import cases
from tests.kernels.cases import make

pytestmark = cases.compiled


@pytest.fixture
def file(tmp_path, monkeypatch):
    """A file of measurements of this test's own; afterwards what is shipped holds again."""
    named = tmp_path / "deep" / "cpu.json"
    monkeypatch.setenv(crossovers.CACHE, str(named))
    crossovers.forget()
    yield named
    monkeypatch.undo()
    crossovers.forget()
    crossovers.apply(load())


def seconds(plain, packed, library):
    return {"as they come": plain, "packed": packed, "library": library}


@pytest.mark.parametrize(
    ("plain", "packed", "library", "expected"),
    [
        ({1: 1, 8: 4}, {1: 2, 8: 3, 64: 9}, {1: 9, 8: 9, 64: 10}, (8, NEVER)),
        ({1: 1, 8: 2}, {1: 2, 8: 3, 64: 9}, {1: 9, 8: 9, 64: 4}, (NEVER, 8)),
        ({1: 3, 8: 4}, {1: 2, 8: 3, 64: 9}, {1: 1, 8: 1, 64: 1}, (1, 0)),
        # One row that is slower by chance does not give up all those behind it.
        ({1: 1, 8: 4}, {1: 2, 8: 3.1, 64: 5, 512: 5}, {1: 9, 8: 3, 64: 9, 512: 9}, (8, NEVER)),
    ],
)
def test_a_crossover_is_where_all_times_together_are_least(plain, packed, library, expected):
    found = measure.crossover(seconds(plain, packed, library))
    assert (found.packed, found.library) == expected
    assert "at 1 rows" in found.note


def test_what_was_measured_is_kept_and_obeyed(file):
    library = load()
    key = crossovers.key(torch.float32, 64)
    before = {dtype: policy.rows_for(dtype, 64, 1) for dtype in DTYPES}
    assert crossovers.store(library.isa, {key: Crossover(5, 77, "2x")}) == file
    crossovers.apply(library)
    assert policy.rows_for(torch.float32, 64, 1) == 77
    for dtype in (torch.bfloat16, torch.float16):
        assert policy.rows_for(dtype, 64, 1) == before[dtype]
    packs = [library.packs(DTYPES[torch.float32], rows, 64) for rows in (4, 5)]
    assert packs == [0, 1]
    assert not library.packs(DTYPES[torch.float32], 5, 4096)  # of another class
    said = dispatch.explain(make((5, 64), (8,), torch.float32)).reason
    assert said.endswith("x packed first (float32 narrow: 2x)")
    said = dispatch.explain(make((78, 64), (8,), torch.float32)).reason
    assert "torch's matmul" in said


def test_other_machines_and_measurements_stay_in_the_file(file):
    isa, row = load().isa, Crossover(5, 77, "2x")
    crossovers.store(isa, {"float32 narrow": row})
    held = json.loads(file.read_text())
    held["machines"]["another"] = {
        "avx2": {"float16 wide": {"packed": 1, "library": 2, "note": "n"}}
    }
    file.write_text(json.dumps(held))
    crossovers.store(isa, {"float32 wide": row})
    found = json.loads(file.read_text())["machines"]
    assert set(found[crossovers.machine()][isa]) == {"float32 narrow", "float32 wide"}
    assert "another" in found
    assert [path.name for path in file.parent.iterdir()] == ["cpu.json"]


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[]",
        '{"version": 2, "machines": {}}',
        '{"version": 1, "machines": {"m": {"avx2": {"k": {"packed": -1, "library": 1}}}}}',
        '{"version": 1, "machines": {"m": {"avx2": {"k": {"packed": 1.5, "library": 1}}}}}',
        '{"version": 1, "machines": {"m": {"avx2": {"k": {"packed": 1}}}}}',
    ],
)
def test_a_file_of_something_else_is_said_and_not_obeyed(file, text, caplog):
    file.parent.mkdir()
    file.write_text(text)
    crossovers.forget()
    isa = load().isa
    found = crossovers.find(isa, torch.float32, 64)
    assert found == crossovers.shipped(isa, torch.float32)
    assert "is not a file of measurements" in caplog.text


def test_switched_off_there_is_no_file(monkeypatch):
    monkeypatch.setenv(crossovers.CACHE, "off")
    assert measurements.path(crossovers.CACHE, crossovers.FILE) is None
    assert crossovers.store("avx2", {}) is None


def test_the_command_measures_every_dtype_and_class(file, monkeypatch):
    monkeypatch.setattr(measure, "SHAPES", {"narrow": (48, 16), "wide": (1024, 8)})
    monkeypatch.setattr(measure, "ROWS", (1, 16, 80))
    monkeypatch.setattr(measure, "BEYOND", 1 << 14)
    monkeypatch.setattr(measure, "SHORT", 0.0)
    result = CliRunner().invoke(app, ["tune", "--json"])
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["file"] == str(file)
    assert len(found["rows"]) == 2 * len(DTYPES)
    for row in found["rows"]:
        assert set(row["seconds"]) == {"as they come", "packed", "library"}
        assert set(row["seconds"]["packed"]) == {"1", "16", "80"}
    assert set(crossovers.measured()[load().isa]) == {row["key"] for row in found["rows"]}
    assert CliRunner().invoke(app, ["tune"]).exit_code == 0
