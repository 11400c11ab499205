"""What breaks folds in real models, one test each: the plan names the reader, or the true reason.

That the folds are exact is shown for all types in tests/graph/test_zoo_folds.py; here is what each
plan must say. Some have their tests beside what they are about (streams, adapters).
"""

import re
from pathlib import Path

import pytest
import torch

import flashnorm
from tests.zoo import tiny_inputs, tiny_model
from tests.zoo.coverage import EXACT
from tests.zoo.fold import fold_outcome


def plan_of(name, **options):
    model = tiny_model(name)
    return flashnorm.inspect(model, tiny_inputs(model), **options)


def sites(plan, pattern):
    found = [site for site in plan.sites if re.search(pattern, site.path)]
    assert found, f"no site matches {pattern}: {[s.path for s in plan.sites]}"
    return found


def all_folded(plan, pattern):
    return all(site.gain_state == "folded" for site in sites(plan, pattern))


def all_kept(plan, pattern, reason):
    return all(s.gain_state == "kept" and re.search(reason, s.reason) for s in sites(plan, pattern))


def readers(plan, pattern):
    """The last parts of the names of what absorbs, over all matching sites."""
    return {
        ".".join(consumer.parameter.removesuffix(".weight").split(".")[-2:])
        for site in sites(plan, pattern)
        for consumer in site.consumers
    }


RESIDUAL = "added to another value, such as the residual"


def test_gotcha_01_residual_taken_after_the_norm():
    assert all_kept(plan_of("minimax"), r"input_layernorm", RESIDUAL)
    assert all_kept(plan_of("openai-gpt"), r"h\.0\.ln_", RESIDUAL)


def test_gotcha_02_one_name_two_roles():
    assert all_folded(plan_of("llama"), r"post_attention_layernorm")
    assert all_kept(plan_of("gemma2"), r"post_attention_layernorm", RESIDUAL)
    roles = {s.gain_state for s in sites(plan_of("olmo_hybrid"), r"post_attention_layernorm")}
    assert roles == {"folded", "kept"}


@pytest.mark.parametrize("name", ["cohere", "cohere2", "cohere2_moe"])
def test_gotcha_03_parallel_blocks_read_one_norm(name):
    found = readers(plan_of(name), r"layers\.\d+\.input_layernorm")
    assert {"self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"} <= found
    assert any("gate" in reader for reader in found)


def test_gotcha_03_multipliers_between_norm_and_mixer():
    found = readers(plan_of("falcon_h1"), r"layers\.\d+\.input_layernorm")
    assert {"self_attn.q_proj", "mamba.in_proj"} <= found


def test_gotcha_04_routers_experts_and_shared_experts():
    found = readers(plan_of("qwen2_moe"), r"post_attention_layernorm")
    assert {"mlp.gate", "experts.gate_up_proj", "mlp.shared_expert_gate"} <= found
    assert {"shared_expert.gate_proj", "shared_expert.up_proj"} <= found


@pytest.mark.parametrize(("name", "axis"), [("mixtral", 2), ("gpt_oss", 1), ("aria_text", 1)])
def test_gotcha_04_the_axis_of_merged_experts(name, axis):
    plan = plan_of(name)
    axes = {
        c.axis for s in plan.folded for c in s.consumers if re.search(r"experts\.\w+", c.parameter)
    }
    assert axis in axes


def test_gotcha_05_kinds_of_layers_in_one_model():
    plan = plan_of("deepseek_v3")
    assert "mlp.gate_proj" in readers(plan, r"layers\.0\.post_attention_layernorm")
    assert "experts.gate_up_proj" in readers(plan, r"layers\.[1-9]\.post_attention_layernorm")


def test_gotcha_06_latent_attention_and_its_indexer():
    plan = plan_of("deepseek_v32")
    found = readers(plan, r"layers\.\d+\.input_layernorm")
    assert {"self_attn.q_a_proj", "self_attn.kv_a_proj_with_mqa"} <= found
    assert any(reader.startswith("indexer.") for reader in found)
    assert readers(plan, r"kv_a_layernorm") == {"self_attn.kv_b_proj"}


@pytest.mark.parametrize("name", ["afmoe", "laguna"])
def test_gotcha_07_output_gates_of_attention(name):
    found = readers(plan_of(name), r"layers\.\d+\.input_layernorm")
    assert any("gate" in reader or reader.endswith("g_proj") for reader in found)


def test_gotcha_08_functions_of_the_norm_that_are_not_linear():
    assert all_kept(plan_of("gemma3n"), r"layers\.0\.input_layernorm", "carries other gains")


def test_gotcha_10_one_plus_w_is_read_off_the_graph():
    def conventions(name):
        return {(s.gain.offset, s.gain.scale) for s in plan_of(name).sites if s.gain}

    assert conventions("gemma") == conventions("gemma2") == {(1.0, 1.0)}
    assert conventions("llama") == {(0.0, 1.0)}
    assert {(0.0, 1.0), (1.0, 1.0)} <= conventions("qwen3_next")


def test_gotcha_11_weightless_norms_have_nothing_to_fold():
    plan = plan_of("olmo")
    assert {(s.kind, s.gain_state) for s in plan.sites} == {("layer", "none")}


def test_gotcha_12_post_norm_gains_stay():
    assert all_kept(plan_of("olmo2"), r"post_(attention|feedforward)_layernorm", RESIDUAL)


def test_gotcha_13_norms_inside_a_sublayer_fold():
    plan = plan_of("bitnet")
    assert readers(plan, r"attn_sub_norm") == {"self_attn.o_proj"}
    assert readers(plan_of("mamba2"), r"mixer\.norm") == {"mixer.out_proj"}


def test_gotcha_13_a_gain_tiled_over_heads():
    plan = plan_of("qwen3_next")
    site = next(s for s in plan.folded if re.search(r"linear_attn\.norm$", s.path))
    (consumer,) = site.consumers
    assert {span.gain_start for span in consumer.spans} == {0}
    assert len(consumer.spans) > 1


@pytest.mark.parametrize("name", ["qwen3", "olmo2", "gemma3_text", "hunyuan_v1_dense"])
def test_gotcha_14_query_and_key_norms_stay(name):
    plan = plan_of(name)
    found = sites(plan, r"(q|k|query|key)_(layer)?norm$")
    assert {site.gain_state for site in found} == {"kept"}


# Each norm with a bias that some reader has no slot for: it stays as β/g, and the gain folds.
NO_SLOT = {
    "gptj": r"ln_1$",
    "codegen": r"ln_1$",
    "gpt_neo": r"ln_1$",
    "stablelm": r"input_layernorm$|post_attention_layernorm$",
    "phimoe": r"post_attention_layernorm$",
}


@pytest.mark.parametrize("name", NO_SLOT)
def test_gotcha_15_a_bias_without_a_slot_stays_with_the_norm(name):
    found = sites(plan_of(name), NO_SLOT[name])
    assert {(site.gain_state, site.bias) for site in found} == {("folded", "carried")}
    assert all("no bias of its own" in site.bias_reason for site in found)


@pytest.mark.parametrize("name", ["gpt2", "opt", "xglm"])
def test_gotcha_15_heads_have_no_bias_either(name):
    final = plan_of(name, untie=True).sites[-1]
    assert (final.gain_state, final.bias) == ("folded", "carried")


def test_gotcha_16_fused_readers():
    plan = plan_of("phi3")
    assert readers(plan, r"input_layernorm") == {"self_attn.qkv_proj"}
    assert readers(plan, r"post_attention_layernorm") == {"mlp.gate_up_proj"}


def test_gotcha_17_tied_heads_are_skipped_and_said_so():
    plan = plan_of("gemma")
    assert all_kept(plan, r"^model\.norm$", "tied to model.embed_tokens.weight.*--untie")
    untied = plan_of("gemma", untie=True)
    assert all_folded(untied, r"^model\.norm$")
    assert untied.untied == (("lm_head.weight", "model.embed_tokens.weight"),)


def test_gotcha_18_the_final_norm_is_an_interface():
    model = tiny_model("llama").model
    plan = flashnorm.inspect(model)
    assert all_kept(plan, r"^norm$", "the model returns its output")
    assert any("hidden states taken after model.norm" in n for n in plan_of("llama").notes)


def test_gotcha_20_what_follows_the_head_is_safe():
    assert all_folded(plan_of("gemma2", untie=True), r"^model\.norm$")


def test_gotcha_21_shared_modules_fold_once():
    outcome = fold_outcome("zamba2", with_inputs=True)
    plan = outcome.plan
    assert len(plan.gains()) < len(plan.folded)  # two visits of the block, one set of gains
    assert all(len(set(pairs)) == len(pairs) for pairs in plan.absorptions().values())
    assert outcome.error < EXACT


def test_gotcha_23_quantized_readers_are_refused():
    class Float8(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = torch.nn.RMSNorm(8)
            weight = torch.randn(4, 8).to(torch.float8_e4m3fn)
            self.weight = torch.nn.Parameter(weight, requires_grad=False)

        def forward(self, x):
            return self.norm(x) @ self.weight.to(x.dtype).t()

    model = Float8()
    torch.nn.init.normal_(model.norm.weight)
    (site,) = flashnorm.inspect(model, torch.randn(2, 8)).sites
    assert site.gain_state == "kept"
    assert "quantized (torch.float8_e4m3fn)" in site.reason


def test_gotcha_24_a_second_fold_is_noticed():
    model = tiny_model("gemma")
    assert flashnorm.folding(flashnorm.fold_(model)).folded
    flashnorm.fold_(model)
    again = flashnorm.inspect(model)
    assert not again.folded
    assert any("one everywhere already" in site.reason for site in again.sites)


def test_gotcha_25_what_was_not_reached_is_said():
    plan = plan_of("git")
    assert any("vision" in name for name in plan.unreached)


def test_every_gotcha_has_a_test_of_its_name():
    text = "".join(file.read_text("utf-8") for file in Path(__file__).parent.rglob("test_*.py"))
    numbers = {int(n) for n in re.findall(r"^def test_gotcha_(\d+)_", text, re.MULTILINE)}
    assert numbers == set(range(1, 29))
