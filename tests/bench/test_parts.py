"""Statistics, tables, memory and the sharing of weights, each alone."""

from __future__ import annotations

import pytest
import torch

from flashnorm.bench.check import why_far, why_wrong
from flashnorm.bench.machine import describe, line
from flashnorm.bench.measure import decode
from flashnorm.bench.memory import forget_peak, in_child, peak_allocated, peak_resident, resident
from flashnorm.bench.models import open_model, parameter_bytes, sharing_copy, token_bytes
from flashnorm.bench.records import (
    EAGER,
    FORWARD,
    GENERATE,
    OURS,
    PREFILL,
    Bandwidth,
    Check,
    Measured,
    Result,
    Row,
    Settings,
    Timing,
)
from flashnorm.bench.show import markdown
from flashnorm.bench.timing import interleaved, stopwatch
from flashnorm.bench.variants import build, many_compilations
from flashnorm.errors import FlashNormError

from .tiny import config

MEGABYTE = 2**20


def test_rounds_are_interleaved_and_the_first_one_warms_up():
    calls = []

    def measured(name, values):
        def run():
            calls.append(name)
            return values.pop(0)

        return run

    runs = {
        "a": measured("a", [9, 1, 5, 2]),
        "b": measured("b", [9, 4, 4, 4]),
        "c": measured("c", [3, 3, 3, 3]),
    }
    timings, errors = interleaved(runs, 3)
    assert "".join(calls) == "abc acb cab cba".replace(" ", "")
    assert timings["a"].seconds == (1, 5, 2)
    assert timings["a"].median == 2
    assert timings["a"].to_json() == {"median": 2e3, "lowest": 1e3, "highest": 5e3, "rounds": 3}
    assert not errors


def test_what_raises_drops_out_and_the_others_keep_their_rounds():
    values = iter([1.0])
    timings, errors = interleaved({"good": lambda: 1.0, "bad": lambda: next(values)}, 4)
    assert list(timings) == ["good"]
    assert len(timings["good"].seconds) == 4
    assert errors == {"bad": "StopIteration"}


def test_a_group_over_its_budget_ends_after_three_rounds():
    timings, _ = interleaved({"slow": lambda: 1.0}, 50, budget=0)
    assert len(timings["slow"].seconds) == 3


def test_short_runs_are_repeated():
    calls = []
    seconds = stopwatch(lambda: calls.append(1))()
    assert len(calls) > 10
    assert seconds < 0.002


def result_with(*rows):
    bandwidth = Bandwidth(20.0, 40.0)
    found = Measured("bf16", 100, 100, (), rows, (), bandwidth, ())
    return Result(Settings("some/model"), describe(), (found,), ())


def test_tables_show_the_rows_where_we_lose():
    def timed(kind, tokens, name, seconds, speedup):
        context = 64 if kind == GENERATE else None
        return Row(kind, tokens, name, Timing((seconds,)), speedup, 10.0, 0.5, 0.25, context)

    text = markdown(
        result_with(
            timed(GENERATE, 1, EAGER, 0.010, 1.0),
            timed(GENERATE, 1, OURS, 0.020, 0.5),
            timed(PREFILL, 16, EAGER, 0.010, 1.0),
            timed(PREFILL, 16, OURS, 0.040, 0.25),
            timed(PREFILL, 64, EAGER, 0.010, 1.0),
        )
    )
    assert "| flashnorm | 20.00 (20.00-20.00) | 0.50x | 10.0 | 50% | 25% |" in text
    assert "| 16 | 10.00 | 40.00 | 0.25x |" in text
    assert "| 64 | 10.00 | – | – |" in text  # a failure leaves its place empty
    assert line(describe()) in text


def test_errors_beyond_rounding_are_wrong():
    def check(error):
        return Check(OURS, 4, 4, None, None, error, 1e-3)

    assert why_wrong(check(1.9e-3), check(1e-3)) is None
    assert "one pass err by 3.0e-03" in why_wrong(check(3e-3), check(1e-3))
    assert why_wrong(check(float("nan")), check(1e-3))


@pytest.mark.parametrize("size", [MEGABYTE, 3 * MEGABYTE + 12])
def test_an_allocation_is_measured_to_the_byte(size):
    assert peak_allocated(lambda: torch.empty(size, dtype=torch.uint8)) == size


def test_the_peak_counts_what_lives_at_once():
    def run():
        first = torch.empty(3 * MEGABYTE, dtype=torch.uint8)
        second = torch.empty(2 * MEGABYTE, dtype=torch.uint8)
        del first
        third = torch.empty(MEGABYTE, dtype=torch.uint8)
        return second, third

    assert peak_allocated(run) == 5 * MEGABYTE


def test_what_lives_only_inside_an_operation_counts():
    """A dispatch mode would see the result alone."""
    x = torch.randn(MEGABYTE)

    @torch.library.custom_op("flashnorm_test::doubled_sum", mutates_args=())
    def doubled_sum(x: torch.Tensor) -> torch.Tensor:
        return (x + x).sum()

    assert peak_allocated(lambda: doubled_sum(x)) >= 4 * MEGABYTE


def test_the_peak_of_the_process_can_be_forgotten():
    held = torch.ones(64 * MEGABYTE, dtype=torch.uint8)
    del held
    forget_peak()
    before = resident()
    assert peak_resident() - before < 16 * MEGABYTE
    held = torch.ones(64 * MEGABYTE, dtype=torch.uint8)
    assert peak_resident() - before >= 60 * MEGABYTE
    del held


def test_a_child_that_fails_says_why():
    with pytest.raises(FlashNormError, match="KeyError: 'threads'"):
        in_child({})


def test_a_copy_shares_every_weight_and_no_module(tmp_path):
    model = open_model(str(config(tmp_path)), "bf16")
    copied = sharing_copy(model)
    tensors = [*model.parameters(), *model.buffers()]
    assert [id(t) for t in [*copied.parameters(), *copied.buffers()]] == [id(t) for t in tensors]
    assert not set(map(id, model.modules())) & set(map(id, copied.modules()))


def test_random_weights_are_the_same_each_time_and_no_gain_is_one(tmp_path):
    first, second = (open_model(str(config(tmp_path)), "fp32") for _ in range(2))
    for a, b in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b)
        assert a.ndim > 1 or not bool((a == 1).all())


@pytest.mark.parametrize("tied", [True, False])
def test_a_table_is_read_only_where_the_head_is_tied_to_it(tmp_path, tied):
    model = open_model(str(config(tmp_path, tie_word_embeddings=tied)), "bf16")
    table = 64 * 32 * 2
    assert parameter_bytes(model) - token_bytes(model) == (0 if tied else table)


def test_decoding_gives_a_rate_beside_the_bandwidth(tmp_path):
    model = open_model(str(config(tmp_path)), "fp32")
    with torch.no_grad():
        rows, failures, bandwidth = decode(
            [build(EAGER, model)], torch.arange(8), 4, 1, token_bytes(model), MEGABYTE
        )
    assert not failures
    assert [row.kind for row in rows] == [GENERATE, FORWARD]
    for row in rows:
        assert row.gigabytes == pytest.approx(token_bytes(model) / row.timing.median / 1e9)
        if bandwidth is not None:
            assert row.of_memory == pytest.approx(row.gigabytes / bandwidth.memory)


def test_a_long_prompt_is_read_once_and_decoded_as_if_it_were_read_again(tmp_path, monkeypatch):
    model = open_model(str(config(tmp_path)), "fp32")
    prompt, forced = torch.arange(20) % 7, torch.arange(20, 26)
    with torch.no_grad():
        variant = build(EAGER, model)
        expected = variant.forced(prompt, forced)
        monkeypatch.setattr("flashnorm.bench.variants.LONG", 16)
        for _ in range(2):
            torch.testing.assert_close(variant.forced(prompt, forced), expected, rtol=0, atol=0)
        monkeypatch.setattr(variant, "start", None)  # not asked again
        variant.loop(prompt, 4)
        torch.testing.assert_close(variant.forced(prompt, forced), expected, rtol=0, atol=0)
        variant.forget()
        with pytest.raises(TypeError):
            variant.loop(prompt, 4)


def test_a_variant_that_leaves_eager_after_a_long_prompt_is_told(tmp_path):
    model = open_model(str(config(tmp_path)), "fp32")
    prompt = torch.arange(40) % 11
    base = Check(EAGER, 4, 4, None, None, 1e-7, 1e-7)
    with torch.no_grad():
        expected = build(EAGER, model).forced(prompt, prompt.new_zeros(8))
        assert why_far(build(EAGER, model), expected, prompt, base) is None
        model.model.layers[1].mlp.down_proj.weight.mul_(1.001)
        assert "from eager's" in why_far(build(EAGER, model), expected, prompt, base)


def test_a_static_cache_decodes_what_a_growing_one_does(tmp_path, monkeypatch):
    """The compiled variant's way to decode, without the minutes of a compiler."""
    monkeypatch.setattr(torch, "compile", lambda model, **_: model)
    model = open_model(str(config(tmp_path)), "fp32")
    prompt, forced = torch.arange(8), torch.arange(20, 26)
    with torch.no_grad(), many_compilations():
        eager, compiled = build(EAGER, model), build("compile", model)
        expected = eager.forced(prompt, forced)
        torch.testing.assert_close(compiled.forced(prompt, forced), expected)
        whole = eager.logits(torch.cat([prompt, forced[:-1]]), len(forced))
    torch.testing.assert_close(expected, whole)
