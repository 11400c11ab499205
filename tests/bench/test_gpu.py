"""The GPU benchmark on a CPU: its pieces, what is wrong, and what a run that is cut has found."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks import gpu as benchmark
from benchmarks.gpu import (
    baselines,
    correctness,
    models,
    operations,
    ours,
    scaled,
    schedule,
    summary,
    worker,
)
from benchmarks.gpu.budget import Budget, OutOfTime, Simulated
from benchmarks.gpu.handoff import MOST_FILES, deliver
from benchmarks.gpu.records import Run, Settings, Shape
from benchmarks.gpu.store import Store
from benchmarks.gpu.variants import GROUPS, REDUCED, TUNED
from benchmarks.gpu.variants import ours as with_us
from flashnorm.bench.records import EAGER, OURS, Timing
from tests.kernels.cases import make

CEILING = {"bytes": 4e12, "operations": 8e14}
ONE = "llama-3.2-1b"


@pytest.fixture(autouse=True)
def _kept(monkeypatch, tmp_path_factory):
    """What a run sets for its process is put back."""
    for name in ("TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR", "FLASHNORM_GPU_CACHE"):
        monkeypatch.setenv(name, str(tmp_path_factory.getbasetemp() / name))
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def work(folder, *stages, seconds=600.0, rounds=1, **options):
    settings = Settings(folder, "cpu", seconds, rounds, dry=True, stages=stages)
    return worker.work(settings, **options)


def results(folder):
    return json.loads((folder / "results.json").read_text("utf-8"))


def rows(folder, stage):
    return results(folder)["stages"].get(stage, [])


@pytest.mark.parametrize("minutes", [2, 5, 9])
def test_what_a_run_has_found_when_it_is_cut(tmp_path, minutes):
    """By the clock of a card: the seconds of the schedule, which are those of GPU pieces."""
    seconds = 60.0 * minutes
    assert work(tmp_path / "work", seconds=seconds, simulate=True) == worker.CUT
    folder, out = tmp_path / "work", tmp_path / "out"
    assert len(rows(folder, "correctness")) >= 25
    groups = [(row["model"], row["group"]) for row in rows(folder, "decode")]
    counts = [row["rows"] for row in rows(folder, "operations") if row["dtype"] == "bf16"]
    if minutes == 2:
        assert groups == [(ONE, "plain"), (ONE, "captured"), (ONE, REDUCED)]
    else:
        assert groups[:5] == [(ONE, group) for group in GROUPS]
        assert counts.count(1) == counts.count(16) == len(operations.SHAPES)
    if minutes == 9:
        assert ("mistral-7b", REDUCED) in groups
        assert {row["tokens"] for row in rows(folder, "prefill")} == set(models.LENGTHS)
        assert rows(folder, "memory")
        assert rows(folder, "training")
        assert counts.count(64) == 6
    text = (folder / "tables.md").read_text("utf-8")
    assert "A dry run on a CPU" in text
    assert f"| {ONE}, {REDUCED} | {with_us(REDUCED)} |" in text
    assert "out of time" in text
    assert not deliver(folder, out)
    assert 4 <= len(list(out.iterdir())) <= MOST_FILES
    said = (out / "summary.txt").read_text("utf-8")
    assert len(said) <= summary.MOST
    assert f"{REDUCED} " in said


def test_a_summary_that_is_too_long_is_cut_between_lines(tmp_path):
    store = Store(tmp_path, False)
    store.begin({"card": "cpu dry run"})
    store.ended.update({f"piece {i}": "out of time " * 5 for i in range(100)})
    said = summary.text(store)
    assert summary.MOST - 200 < len(said) <= summary.MOST
    assert said.endswith(f"{summary.MORE}\n")


def test_a_resumed_run_measures_nothing_again(tmp_path):
    stages = ("ceilings", "few-rows", "scaled")
    assert work(tmp_path, *stages, seconds=75.0, simulate=True) == worker.CUT
    first = results(tmp_path)["stages"]
    assert 0 < len(first["operations"]) < 18
    with pytest.raises(SystemExit, match="give --resume to go on"):
        work(tmp_path, *stages)
    assert work(tmp_path, *stages, resume=True) == 0
    again = results(tmp_path)["stages"]
    for stage, found in first.items():
        assert again[stage][: len(found)] == found
    assert {row["run"] for row in again["operations"]} == {0, 1}
    assert len(again["scaled"]) == 12


def test_a_wrong_kernel_is_listed_and_not_timed(tmp_path, monkeypatch):
    right = ours.run

    def wrong(call, way=ours.CHOSEN):
        return [y * 1.1 if call.activation and len(call.x) == 16 else y for y in right(call, way)]

    monkeypatch.setattr(ours, "run", wrong)
    assert work(tmp_path, "few-rows") == worker.WRONG
    bad = [row for row in rows(tmp_path, "operations") if row["excluded"]]
    assert [(row["shape"], row["rows"]) for row in bad] == [(str(s), 16) for s in operations.GLU]
    assert all("times what rounding explains" in row["excluded"] for row in bad)
    assert all("microseconds" not in row for row in bad)
    assert "WRONG 576→3072 GLU, 16 rows" in (tmp_path / "summary.txt").read_text("utf-8")


def test_another_side_that_is_wrong_is_timed_and_marked(tmp_path, monkeypatch):
    right = baselines.torch_norm

    def wrong(given):
        run = right(given)
        return lambda i: run(i) * 1.1

    monkeypatch.setattr(baselines, "torch_norm", wrong)
    assert work(tmp_path, "few-rows") == 0
    for row in rows(tmp_path, "operations"):
        assert "times what rounding explains" in row["wrong"][operations.TORCH]
        assert row["microseconds"][operations.TORCH] > 0
        assert row["best"] == operations.TORCH
    assert "RIVAL WRONG 576→960, 1 rows" in (tmp_path / "summary.txt").read_text("utf-8")
    text = (tmp_path / "tables.md").read_text("utf-8")
    assert " ! |" in text
    assert "WRONG: the error is" in text


def test_a_wrong_product_makes_the_exit_code(tmp_path, monkeypatch):
    right = scaled.scaled_product
    monkeypatch.setattr(scaled, "scaled_product", lambda *args: right(*args) * 1.1)
    assert work(tmp_path, "scaled") == worker.WRONG
    assert "off its own terms" in (tmp_path / "tables.md").read_text("utf-8")


def test_a_wrong_check_makes_the_exit_code(tmp_path, monkeypatch):
    right = ours.run
    monkeypatch.setattr(ours, "run", lambda call, way: [y + 1 for y in right(call, way)])
    assert work(tmp_path, "checks") == worker.WRONG
    assert "WRONG: way=chosen" in (tmp_path / "tables.md").read_text("utf-8")


@pytest.mark.parametrize(("who", "code"), [(REDUCED, 0), (with_us(REDUCED), worker.WRONG)])
def test_a_variant_that_is_wrong_is_said_and_ours_is_not_timed(tmp_path, monkeypatch, who, code):
    build = models.build

    def built(name, model, device):
        variant = build(name, model, device)
        if name == who:
            step = variant.step
            variant.step = lambda token, cache: step(token, cache).roll(1)
        return variant

    monkeypatch.setattr(models, "build", built)
    assert work(tmp_path, f"decode-{ONE}") == code
    (row,) = (row for row in rows(tmp_path, "decode") if row["group"] == REDUCED)
    assert "its logits err by" in row["wrong"][who]
    assert (who in row["milliseconds"]) == (who == REDUCED)
    said = (tmp_path / "summary.txt").read_text("utf-8")
    assert f"{'RIVAL ' if who == REDUCED else ''}WRONG {ONE}, {who}" in said


def test_every_way_to_decode_stands_beside_eager_and_ours(tmp_path):
    work(tmp_path, f"decode-{ONE}")
    for row in rows(tmp_path, "decode"):
        timed = set(row["milliseconds"])
        assert timed | set(row["failed"]) >= {EAGER, OURS, *GROUPS[row["group"]]}
        assert row["device_milliseconds"].keys() == timed
        assert all(row["checks"][name]["equal"] == 32 for name in timed)
        if row["group"] == TUNED:
            assert timed >= set(GROUPS[REDUCED])


def test_a_piece_that_fails_is_said_and_tried_again(tmp_path, monkeypatch):
    measured = operations._measure

    def fails(run, shape, given, mode):
        if shape.n == 32:
            raise RuntimeError("out of memory")
        return measured(run, shape, given, mode)

    monkeypatch.setattr(operations, "_measure", fails)
    assert work(tmp_path, "few-rows") == worker.CUT
    found = results(tmp_path)
    assert len(found["stages"]["operations"]) == 12
    assert found["incomplete"]["operations, 2048→2560, 1, bf16"] == "RuntimeError: out of memory"
    monkeypatch.setattr(operations, "_measure", measured)
    assert work(tmp_path, "few-rows", resume=True) == 0
    assert len(rows(tmp_path, "operations")) == 18


def test_a_device_that_stopped_answering_ends_the_process(tmp_path, monkeypatch):
    """On a CPU there is none: as it would be on one."""
    run = Run(Settings(tmp_path, "cuda"), Store(tmp_path, False), Budget(100))
    monkeypatch.setattr(worker, "_answers", lambda: False)
    with pytest.raises(worker.Broken, match="an illegal memory access"):
        worker._failed(run, "a piece", RuntimeError("an illegal memory access"))


def test_a_full_disk_loses_nothing_that_is_printed(tmp_path, monkeypatch, capsys):
    replace = os.replace

    def full(source, target):
        if str(target).endswith("results.json") and len(list(tmp_path.glob("*.csv"))):
            raise OSError(28, "No space left on device")
        replace(source, target)

    monkeypatch.setattr(os, "replace", full)
    assert work(tmp_path, "ceilings", "few-rows") == worker.CUT
    said = capsys.readouterr().out
    assert said.count("rows, bf16:") == 18
    assert "NOT MEASURED results.json" in (tmp_path / "summary.txt").read_text("utf-8")
    assert len(rows(tmp_path, "operations")) == 0


def test_sigterm_ends_a_run_with_what_it_has(tmp_path, monkeypatch):
    right, seen = ours.run, []

    def killed(call, way):
        seen.append(way)
        if len(seen) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return right(call, way)

    monkeypatch.setattr(ours, "run", killed)
    before = signal.getsignal(signal.SIGTERM)
    assert work(tmp_path, "checks", "few-rows") == worker.CUT
    assert len(rows(tmp_path, "correctness")) == 2
    assert results(tmp_path)["incomplete"] == {"run": "interrupted"}
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_stage_has_its_own_time_and_what_was_left_before_it():
    budget = Budget(100, clock := Simulated())
    with budget.stage(10):
        assert budget.left() == 10
        with pytest.raises(OutOfTime, match="11 s were needed"):
            budget.check(11)
        clock.spend(4)
    with budget.stage(20):
        assert budget.left() == 26
        clock.spend(30)
        with pytest.raises(OutOfTime, match="0 s were left"):
            budget.check()
    with budget.stage(1000):
        assert budget.left() == 66


def test_results_of_another_card_are_not_continued(tmp_path):
    Store(tmp_path, False).begin({"card": "one"})
    with pytest.raises(SystemExit, match="holds results of one, and this is two"):
        Store(tmp_path, True).begin({"card": "two"})


def test_inputs_of_a_check_are_made_once_for_all_ways(tmp_path, monkeypatch):
    made = []
    monkeypatch.setattr(correctness, "make", lambda *a, **k: made.append(1) or make(*a, **k))
    monkeypatch.setattr(ours, "ways", lambda rows, device: (ours.CHOSEN, "matmul", "again"))
    monkeypatch.setattr(ours, "run", lambda call, way, right=ours.run: right(call))
    monkeypatch.setattr(ours, "way_of", lambda call, way: "cpu")
    run = Run(Settings(tmp_path, "cpu", dry=True), Store(tmp_path, False), Budget(100))
    pieces = list(correctness.some(run))
    assert len(made) == len(pieces) / 3 == 25
    first = pieces[0].measure.args[1]
    assert first.expected("matmul") is first.expected("again")


def test_roofline_counts_each_byte_and_operation_once():
    """By hand: 4096→6144 reads 48 MiB of weights; at 4096 rows it is 206 GFLOP."""
    one, limit = operations.roofline(Shape(4096, 6144), 1, CEILING)
    assert limit == "memory"
    assert one == pytest.approx((4096 * 6144 + 4096 + 6144) * 2 / 4e12)
    many, limit = operations.roofline(Shape(4096, 6144), 4096, CEILING)
    assert limit == "arithmetic"
    assert many == pytest.approx(2 * 4096 * 4096 * 6144 / 8e14)
    gated, _ = operations.roofline(Shape(4096, 6144, True), 1, CEILING)
    assert gated == pytest.approx((4096 * 6144 + 4096 + 3072) * 2 / 4e12)
    wide, _ = operations.roofline(Shape(4096, 6144), 1, CEILING, 4)
    assert wide == pytest.approx(2 * one)


def test_the_speedup_is_over_the_best_other_side():
    times = {"ours": 2e-6, "torch norm + matmul": 5e-6, "torch.compile": 3e-6, "matmul alone": 1e-6}
    timings = {name: Timing((value, value, 9.0)) for name, value in times.items()}
    found = operations.weighed(Shape(64, 64), 1, timings, CEILING)
    assert found["best"] == "torch.compile"
    assert found["speedup"] == pytest.approx(1.5)


@pytest.mark.parametrize(("change", "least"), [(float("nan"), 1e300), (0.5, 1.0)])
def test_errors_are_weighed_in_parts_of_their_bound(change, least):
    call = make((3, 64), (32,), torch.bfloat16)
    found = ours.run(call)
    expected = correctness.Expected(call, ours.LIBRARY)
    assert expected.share(found) <= 1
    found[0][1, 5] += change
    assert expected.share(found) > least


def test_sums_in_half_precision_are_off_within_and_as_before_after():
    cuda = torch.backends.cuda.matmul
    before = cuda.allow_bf16_reduced_precision_reduction
    with correctness.exact_sums():
        assert not cuda.allow_bf16_reduced_precision_reduction
        assert not cuda.allow_fp16_reduced_precision_reduction
    assert cuda.allow_bf16_reduced_precision_reduction == before


def test_what_is_compiled_ahead_is_compiled_once_for_launches_that_are_alike():
    def step(rows, dtype, warps):
        arguments = {"x": torch.zeros(rows, dtype=dtype), "n": 64}
        return SimpleNamespace(
            kernel=SimpleNamespace(__name__="k"), warps=warps, stages=2, arguments=arguments
        )

    alike = [step(1, torch.float32, 4), step(5, torch.float32, 4)]
    others = [step(1, torch.bfloat16, 4), step(1, torch.float32, 8)]
    assert len({ours._alike(each) for each in alike}) == 1
    assert len({ours._alike(each) for each in (*alike, *others)}) == 3


def test_the_readme_says_what_each_stage_answers(tmp_path):
    text = (Path(benchmark.__file__).parents[1] / "README.md").read_text("utf-8")
    stages = schedule.stages(Settings(tmp_path, tune=True))
    rows = [f"| `{stage.name}` | {stage.seconds} | {stage.answers} |" for stage in stages]
    assert "\n".join(rows) in text
    until = [stage.name for stage in stages].index("decode-mistral-7b")
    wanted = sum(stage.seconds for stage in stages[: until + 1] if stage.name != "tune")
    assert wanted <= 9 * 60 - 60  # what is asked for first fits, with a minute for the rest


def test_ours_is_timed_without_each_part_that_a_call_has(monkeypatch):
    from flashnorm.kernels.gpu import switches

    seen = []

    def run(call, way=ours.CHOSEN, tile=None):
        seen.append((way, tile and tile.splits, switches.turned_off(), call.weights))

    monkeypatch.setattr(ours, "run", run)
    monkeypatch.setattr(ours, "starts_early", lambda call: True)
    call = make((16, 2048), (64,), torch.bfloat16)
    monkeypatch.setattr(ours, "way_of", lambda call, way: "skinny")
    found = operations._without([call])
    assert list(found) == [operations.LATE, operations.WHOLE]
    for each in found.values():
        each(0)
    assert [(way, splits, off) for way, splits, off, _ in seen] == [
        (ours.CHOSEN, None, ("early",)),
        ("skinny", 1, ()),
    ]
    short = make((16, 64), (64,), torch.bfloat16)
    assert list(operations._without([short])) == [operations.LATE]
    monkeypatch.setattr(ours, "way_of", lambda call, way: "matmul")
    assert not operations._without([call])
    gated = make((64, 64), (16, 16), torch.bfloat16, activation="silu")
    operations._without([gated])[operations.APART](0)
    assert seen[-1][3] == tuple(reversed(gated.weights))


def test_each_part_is_left_out_of_one_variant_alone(monkeypatch):
    """Accelerated, compiled and called without it; everything else is with it."""
    from benchmarks.gpu import variants
    from flashnorm.kernels.gpu import switches

    own = models.Bench("tiny", "cpu", dry=True)
    seen = {}

    def compiled(model, **options):
        return lambda *args, **kwargs: seen.update(called=switches.turned_off())

    def accelerated(model):
        seen["accelerated"] = switches.turned_off()
        return variants.sharing_copy(model)

    monkeypatch.setattr(torch, "compile", compiled)
    monkeypatch.setattr(variants, "accelerated_copy", accelerated)
    parts = {**variants.WITHOUT, variants.LATE_NORM: "deferral"}
    assert {*parts.values()} == {*switches.NAMES}
    for name, part in parts.items():
        made = variants.build(name, own.model, "cuda")
        made.call()
        assert made.name == name
        assert seen == {"accelerated": (part,), "called": (part,)}
    whole = variants.build(variants.ours(variants.FOLDED), own.model, "cuda")
    whole.call()
    assert seen == {"accelerated": (), "called": ()}
    gains = [n for n, _ in whole.model.named_parameters() if "norm" in n]
    assert not gains
