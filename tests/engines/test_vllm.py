"""Folded models in vLLM: the same greedy tokens, by whatever way they got there."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from . import models

pytest.importorskip("vllm")

SCRIPT = Path(__file__).with_name("in_vllm.py")
PROMPTS = [[5, 6, 7, 8, 9, 10], [200, 3, 77], [11] * 9]
OURS = {"load_format": "flashnorm"}
UNTIE = {"model_loader_extra_config": {"untie": True}}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("vllm")


def ask(model: Path, **options: Any) -> tuple[dict[str, Any] | None, str]:
    """What vLLM answers, None where it fails, and what it says."""
    given = {"dtype": "float32", "enforce_eager": True, "prompts": PROMPTS, "model": str(model)}
    done = subprocess.run(
        [sys.executable, SCRIPT, json.dumps({**given, **options})],
        capture_output=True,
        text=True,
        timeout=600,
    )
    said = done.stdout + done.stderr
    if done.returncode:
        return None, said
    lines = done.stdout.splitlines()  # workers may say more while they end
    return json.loads(next(line for line in lines if line.startswith('{"version"'))), said


_answers: dict[str, Any] = {}


def answer(root: Path, family: str, kind: str, **options: Any) -> dict[str, Any]:
    key = json.dumps([family, kind, options])
    if key not in _answers:
        found, said = ask(models.checkpoint(root, family, kind), **options)
        assert found is not None, said[-3000:]
        _answers[key] = found
    return _answers[key]


@pytest.mark.parametrize("family", models.FAMILIES)
def test_folded_while_loading_is_folded_on_disk_bit_for_bit(root, family):
    while_loading = answer(root, family, "plain", **OURS)
    on_disk = answer(root, family, "compat")
    assert while_loading["weights"] == on_disk["weights"]
    assert while_loading["tokens"] == on_disk["tokens"]
    assert while_loading["logprobs"] == on_disk["logprobs"]


@pytest.mark.parametrize("family", models.FAMILIES)
def test_the_tokens_are_those_of_the_original(root, family):
    plain, folded = answer(root, family, "plain"), answer(root, family, "plain", **OURS)
    assert plain["tokens"] == folded["tokens"]
    assert plain["weights"] != folded["weights"]


@pytest.mark.parametrize("family", models.FAMILIES)
def test_a_strict_checkpoint_loads_and_is_the_compatible_one(root, family):
    strict, compat = answer(root, family, "strict", **OURS), answer(root, family, "compat")
    assert strict["weights"] == compat["weights"]
    assert strict["tokens"] == compat["tokens"]


@pytest.mark.parametrize("family", models.FAMILIES)
def test_a_checkpoint_that_was_folded_is_not_folded_again(root, family):
    again, compat = answer(root, family, "compat", **OURS), answer(root, family, "compat")
    assert again["weights"] == compat["weights"]


def test_a_head_of_its_own_folds_too(root):
    plain, untied = answer(root, "llama", "plain"), answer(root, "llama", "plain", **OURS, **UNTIE)
    on_disk = answer(root, "llama", "untie")
    assert untied["weights"] == on_disk["weights"]
    assert untied["weights"].keys() > plain["weights"].keys()
    assert untied["tokens"] == plain["tokens"]


@pytest.mark.parametrize(("kind", "options"), [("plain", {**OURS, **UNTIE}), ("untie", {})])
def test_a_model_that_vllm_builds_without_a_head_refuses_one(root, kind, options):
    """vLLM's Gemma multiplies by its embedding, whatever its config says."""
    found, said = ask(models.checkpoint(root, "gemma2", kind), **options)
    assert found is None
    assert "no module or parameter named 'lm_head'" in said


@pytest.mark.parametrize("family", ["llama"])
def test_two_shards_of_tensor_parallelism_are_folded_before_they_are_cut(root, family):
    """Each process folds whole tensors and keeps its part of them."""
    both = {"tensor_parallel_size": 2, "distributed_executor_backend": "mp"}
    plain, folded = answer(root, family, "plain"), answer(root, family, "plain", **OURS, **both)
    assert folded["tokens"] == plain["tokens"]


def test_vllm_alone_refuses_a_strict_checkpoint(root):
    """Nothing is filled in unnoticed; when vLLM learns to do so, our page has to say it."""
    found, said = ask(models.checkpoint(root, "llama", "strict"))
    assert found is None
    assert "not initialized from checkpoint" in said


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"enable_lora": True}, "adapters were trained on the original weights"),
        ({"runner": "pooling"}, "the hidden states themselves are the result"),
    ],
)
def test_what_nobody_would_see_is_refused(root, options, why):
    found, said = ask(models.checkpoint(root, "llama", "plain"), **OURS, **options)
    assert found is None
    assert why in said


# Our kernels in vLLM's compiled graphs: steps of up to 8 tokens.
COMPILED = {"enforce_eager": False}
KERNELS = {**OURS, "model_loader_extra_config": {"kernels": 8}}
PRODUCTS = {"llama": 8, "gemma2": 8, "qwen3-moe": 6, "gpt-neox": 8}


@pytest.mark.parametrize("family", models.FAMILIES)
def test_kernels_in_its_graphs_give_the_same_tokens(root, family):
    found, said = ask(models.checkpoint(root, family, "plain"), **COMPILED, **KERNELS)
    assert found is not None, said[-3000:]
    count = PRODUCTS[family]
    assert f"flashnorm: {count} of {count} products of a graph are its calls" in said
    plain = answer(root, family, "plain", **COMPILED)
    assert found["tokens"] == plain["tokens"]
    for ours, theirs in zip(found["logprobs"], plain["logprobs"], strict=True):
        assert ours == pytest.approx(theirs, abs=2e-4)


def test_steps_of_more_tokens_are_those_of_vllm_bit_for_bit(root):
    """Its own graph runs them: three prompts of 18 tokens at once, and one token each."""
    short = {**COMPILED, "tokens": 1}
    ours, theirs = (answer(root, "llama", "plain", **short, **each) for each in (KERNELS, OURS))
    assert ours["logprobs"] == theirs["logprobs"]


@pytest.mark.parametrize("kind", ["compat", "strict"])
def test_kernels_run_what_was_folded_on_disk(root, kind):
    folded = answer(root, "llama", kind, **COMPILED, **KERNELS)
    assert folded["tokens"] == answer(root, "llama", "plain", **COMPILED)["tokens"]


@pytest.mark.parametrize("most", [8, True])
def test_kernels_run_each_shard(root, most):
    both = {"tensor_parallel_size": 2, "distributed_executor_backend": "mp"}
    asked = {**OURS, "model_loader_extra_config": {"kernels": most}}
    found, said = ask(models.checkpoint(root, "llama", "plain"), **COMPILED, **asked, **both)
    assert found is not None, said[-3000:]
    assert said.count("8 of 8 products of a graph are its calls") == 2
    assert found["tokens"] == answer(root, "llama", "plain")["tokens"]


def test_where_kernels_cannot_run_vllm_says_so_and_runs_its_own(root):
    found, said = ask(models.checkpoint(root, "llama", "plain"), **KERNELS)
    assert found is not None, said[-3000:]
    assert "vLLM's own kernels run: its kernels need vLLM's compiled graphs" in said
    assert found["tokens"] == answer(root, "llama", "plain")["tokens"]


def test_what_kernels_are_asked_for_is_understood_or_refused(root):
    options = {**OURS, "model_loader_extra_config": {"kernels": "fast"}}
    found, said = ask(models.checkpoint(root, "llama", "plain"), **options)
    assert found is None
    assert (
        "\"kernels\" is 'fast': say true (measured at the start), false, or up to how many" in said
    )


def test_how_fast_they_are_is_measured_at_the_start(root):
    measured = {**OURS, "model_loader_extra_config": {"kernels": True}}
    found, said = ask(models.checkpoint(root, "llama", "plain"), **COMPILED, **measured)
    assert found is not None, said[-3000:]
    assert re.search(r"flashnorm: steps of .* tokens run on its kernels \(1: \d+\.\d\dx, 2: ", said)
    assert found["tokens"] == answer(root, "llama", "plain")["tokens"]


@pytest.mark.parametrize(("tokens", "taken"), [(8, True), (4096, False)])
def test_the_pass_for_gpus_before_vllms_own(tokens, taken):
    """On a graph with its operations, as vLLM runs passes for a range of tokens on a GPU."""
    from torch.fx.experimental.proxy_tensor import make_fx
    from vllm import ir
    from vllm.compilation.passes.inductor_pass import get_pass_context, pass_context
    from vllm.compilation.passes.ir.lowering_pass import VllmIRLoweringPass
    from vllm.config import CompilationMode, VllmConfig, set_current_vllm_config
    from vllm.config.utils import Range

    from flashnorm.engines.vllm_cuda import PASS, add_pass_, why_not
    from flashnorm.kernels import ops

    def program(x, r, gain, up, down):
        z, total = ir.ops.fused_add_rms_norm(x, r, gain, 1e-5)
        return ir.ops.rms_norm(z @ up.t(), gain, 1e-5) @ down.t(), total

    torch.manual_seed(0)
    args = [torch.randn(shape) for shape in ((3, 64), (3, 64), (64,), (64, 64), (64, 64))]
    with ir.enable_torch_wrap(True):
        module = make_fx(program, tracing_mode="fake")(*args)
    config = VllmConfig()
    compilation = config.compilation_config
    assert "say up to how many tokens" in why_not(config, None)
    assert "need vLLM's compiled graphs" in why_not(config, 8)  # those of a CPU are others
    compilation.mode, compilation.backend = CompilationMode.VLLM_COMPILE, "inductor"
    assert why_not(config, 8) == ""
    add_pass_(config, 8)
    assert 8 in compilation.compile_ranges_endpoints
    assert why_not(config, 8) == f"another {PASS} is set"
    ours = compilation.inductor_compile_config[PASS]
    assert len(ours.uuid()) == 64
    with set_current_vllm_config(config), pass_context(Range(1, tokens)):
        if ours.is_applicable_for_range(get_pass_context().compile_range):
            ours(module.graph)
        VllmIRLoweringPass(config)(module.graph)  # the next one, of those that a CPU has
    module.recompile()
    calls = [node for node in module.graph.nodes if node.target is ops.operator]
    assert len(calls) == (2 if taken else 0)
    for found, exact in zip(module(*args), program(*(a.double() for a in args)), strict=True):
        assert (found - exact).abs().max() < 1e-5
