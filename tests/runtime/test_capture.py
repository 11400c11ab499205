"""The policy of a GPU, on a backend in numpy: which operations run, and when.

It captures nothing, and says that it does where a test wants it.
"""

import copy
import pickle

import pytest
import torch
from torch._dynamo.utils import counters
from torch.nn import functional as F
from transformers import GemmaConfig, Phi3Config

import flashnorm
from flashnorm.bench.variants import Variant
from flashnorm.kernels import dispatch, norms
from flashnorm.kernels.call import Call
from flashnorm.kernels.gpu import policy as gpu
from flashnorm.runtime.forward_norm import FusedNorm
from flashnorm.runtime.forwards import FusedGated, FusedLinear
from tests.kernels.bounds import assert_close
from tests.kernels.cases import random
from tests.runtime.models import LLAMA, NEOX, QWEN3, SIZES, close, dyt, ids, logits, tiny
from tests.toys.capturing import ATTENTION, Capturing, capturing

GEMMA = GemmaConfig(**SIZES, num_key_value_heads=2, head_dim=16)
PHI3 = Phi3Config(**SIZES, num_key_value_heads=2, pad_token_id=0)
MORE = {"gemma": GEMMA, "phi3": PHI3, "dyt": dyt}
CONFIGS = {"llama": LLAMA, "qwen3": QWEN3, "gpt_neox": NEOX, **MORE}


@pytest.fixture(autouse=True, params=["capturing"])
def backend():
    """The only one of these tests."""
    with capturing() as found:
        yield found


@pytest.fixture
def capture(backend):
    return backend.capture


def accelerated(config=LLAMA, dtype=torch.float32):
    """(the original, the same model accelerated and past its first call)."""
    original = config(dtype) if callable(config) else tiny(config, dtype)
    model = flashnorm.accelerate_(copy.deepcopy(original))
    logits(model, ids())
    return original, model


@pytest.fixture
def calls(backend, monkeypatch):
    """A list that grows by the norm and the widths of every fused call."""
    made = []
    run = Capturing.run

    def counted(self, call):
        made.append((call.norm.name, *(w.shape[0] for w in call.weights)))
        return run(self, call)

    monkeypatch.setattr(Capturing, "run", counted)
    return made


LAYER = [("rms", 32, 64, 32), ("rms", 160, 160)]
ALL = [*LAYER, *LAYER]  # the head reads a part of the last norm's output
ALONE = 2 * len(["o", "down"]) + 1  # what has no norm before it, and the head


def test_a_dynamic_tanh_is_in_its_readers_in_a_capture(capture, calls):
    original, model = accelerated(dyt)
    logits(model, ids(1, 1))
    capture.on = True
    for change in (1, 2):
        for m in (original, model):
            m.model.layers[0].input_layernorm.alpha.data.mul_(change)
        calls.clear()
        assert close(logits(model, ids(1, 1)), logits(original, ids(1, 1)))
        assert calls == [("dyt", *widths) for _, *widths in ALL]


@pytest.mark.parametrize("name", CONFIGS)
def test_the_outputs_are_those_of_the_original(capture, name):
    original, model = accelerated(CONFIGS[name])
    for shape in ((1, 1), (1, 1), (2, 40)):
        tokens = ids(*shape)
        with dispatch.forbid_fallback():
            found = logits(model, tokens)
        assert close(found, logits(original, tokens)), shape
    capture.on = True
    assert close(logits(model, ids(1, 1)), logits(original, ids(1, 1)))


def test_kernels_with_the_norm_inside_run_once_to_be_loaded_and_then_in_captures(capture, calls):
    _, model = accelerated()
    for captured, expected in ((False, ALL), (False, []), (True, ALL), (True, ALL), (False, [])):
        calls.clear()
        capture.on = captured
        logits(model, ids(1, 1))
        assert calls == expected


def test_a_kernel_that_cannot_be_loaded_is_tried_once_and_said(capture, monkeypatch, caplog):
    """A machine without a compiler, say: the model runs as it did before."""
    original, tried = tiny(LLAMA), []
    model = flashnorm.accelerate_(copy.deepcopy(original))

    def fails(self, call):
        tried.append(call)
        raise RuntimeError("no C compiler\nhere")

    monkeypatch.setattr(Capturing, "run", fails)
    for captured in (False, False, True, True):
        capture.on = captured
        assert close(logits(model, ids(1, 1)), logits(original, ids(1, 1)))
    norms_with_readers = 4  # of two layers; the last one's reader has a part of its output
    assert len(tried) == norms_with_readers
    said = [record.getMessage() for record in caplog.records]
    assert said.count("a kernel cannot be loaded: RuntimeError: no C compiler") == len(tried)


def test_a_capture_loads_nothing(capture, calls):
    """Rows that were not seen before, so whose kernels may not be loaded."""
    original, model = accelerated()
    calls.clear()
    capture.on = True
    assert close(logits(model, ids(1, 3)), logits(original, ids(1, 3)))
    assert calls == []


def test_many_rows_leave_norms_and_products_to_the_library_and_join_the_gate(capture, calls):
    original, model = accelerated()
    calls.clear()
    tokens = ids(1, gpu.FEW + 1)
    assert close(logits(model, tokens), logits(original, tokens))
    assert calls == [("none", 160, 160)] * 2


def test_what_has_no_norm_before_it_keeps_its_forward(capture):
    _, model = accelerated()
    layer, kinds = model.model.layers[0], {}
    for path, module in model.named_modules():
        if "forward" in module.__dict__:
            kinds.setdefault(type(module.__dict__["forward"]), []).append(path)
    assert set(kinds) == {FusedLinear, FusedGated, FusedNorm}
    layer.self_attn.o_proj.forward.why_not = None  # is not asked: the module's own code runs
    logits(model, ids(1, 1))
    reasons = {part.path: part.reason for part in flashnorm.acceleration(model).parts}
    assert reasons["model.layers.0.self_attn.o_proj"] == gpu.LIBRARY
    assert reasons["model.layers.0.self_attn.q_proj"] == ""
    assert flashnorm.acceleration(model).attention == ATTENTION


def test_a_value_that_was_changed_in_place_is_seen(capture):
    original, model = accelerated()
    capture.on = True
    logits(model, ids(1, 1))

    def doubled(module, args, z):
        z.mul_(2)

    for each in (original, model):
        each.model.layers[0].input_layernorm.register_forward_hook(doubled)
    capture.on = False
    logits(model, ids(1, 1))
    capture.on = True
    assert close(logits(model, ids(1, 1)), logits(original, ids(1, 1)))


def test_gradients_are_those_of_the_model_itself(capture):
    original, model = accelerated()
    for each in (original, model):
        each(ids(), use_cache=False).logits.square().sum().backward()
    assert dispatch.fallbacks()[dispatch.GRADIENT]
    pairs = zip(original.parameters(), model.parameters(), strict=True)
    assert all(torch.equal(a.grad, b.grad) for a, b in pairs)


def test_a_model_that_has_left_the_gpu_says_so(capture):
    original, model = accelerated()
    capture.here = False
    said = "x is on cpu, not where the capturing kernels run"
    with pytest.raises(flashnorm.FlashNormError, match=said), dispatch.forbid_fallback():
        logits(model, ids())
    assert torch.equal(logits(model, ids()), logits(original, ids()))


def test_restored_and_copied(capture):
    original, model = accelerated()
    twin = pickle.loads(pickle.dumps(model))
    assert close(logits(twin, ids(1, 1)), logits(original, ids(1, 1)))
    flashnorm.restore_(model)
    assert torch.equal(logits(model, ids()), logits(original, ids()))


def graph_of(model, tokens):
    """(logits, names of the operations) of the whole model as one compiled graph."""
    names = []

    def backend(module, inputs):
        from functorch.compile import make_boxed_func
        from torch._dynamo.backends.common import aot_autograd

        def noted(module, inputs):
            names.extend(str(node.target) for node in module.graph.nodes)
            return make_boxed_func(module.forward)

        return aot_autograd(fw_compiler=noted)(module, inputs)

    torch._dynamo.reset()
    compiled = torch.compile(model, backend=backend, fullgraph=True, dynamic=False)
    return logits(compiled, tokens), names


def test_a_compiled_graph_has_no_norm_left_but_inside_the_kernels(capture):
    original, model = accelerated(dtype=torch.bfloat16)
    expected = logits(original, ids(1, 1))
    found, names = graph_of(model, ids(1, 1))
    assert close(found, expected, torch.bfloat16)
    assert names.count("flashnorm.norm_linear.default") == len(ALL) + ALONE
    assert sum("rsqrt" in name for name in names) == 1
    found, names = graph_of(model, ids(1, gpu.FEW_COMPILED + 1))
    assert not any("flashnorm" in name for name in names)
    assert sum("rsqrt" in name for name in names) == 5


def test_a_compiled_graph_obeys_a_hook_that_changes_the_normalized_values(capture):
    original, model = accelerated(dtype=torch.bfloat16)

    def doubled(module, args, z):
        z.mul_(2)

    for each in (original, model):
        each.model.layers[1].input_layernorm.register_forward_hook(doubled)
    found, names = graph_of(model, ids(1, 1))
    assert close(found, logits(original, ids(1, 1)), torch.bfloat16)
    # q, k and v of that layer are by themselves.
    assert names.count("flashnorm.norm_linear.default") == len(ALL) + ALONE - 1 + 3


@pytest.mark.parametrize("kind", ["rms", "layer"])
@pytest.mark.parametrize(("offset", "bias"), [(0.0, ""), (1.0, ""), (0.0, "bias"), (1.0, "bias")])
def test_a_norm_alone_is_rounded_once(kind, offset, bias):
    """As a product with the identity, whose bound it keeps."""
    n, dtype = 48, torch.bfloat16
    x = random(5, n, dtype=dtype, scale=3) + 2
    gain, shift = random(n, dtype=dtype, seed=1), random(n, dtype=dtype, seed=2) if bias else None
    call = Call(x, (torch.eye(n, dtype=dtype),), None, norms.find(kind), 1e-5, gain, offset, shift)
    assert_close(call, [gpu.normalized(call)])


def test_activations_of_few_rows_are_the_library_s(capture, monkeypatch):
    _, model = accelerated()
    seen = []
    monkeypatch.setattr(F, "linear", lambda *args, run=F.linear: seen.append(1) or run(*args))
    logits(model, ids(1, 1))
    seen.clear()
    logits(model, ids(1, 1))
    assert len(seen) == 7 * 2 + 1


def test_tokens_are_decoded_by_one_compiled_graph(capture):
    """With a static cache: nothing is compiled again as it fills, and nothing breaks the graph."""
    original, model = accelerated(dtype=torch.bfloat16)
    torch._dynamo.reset()
    counters.clear()
    ours = Variant("ours", model, False)
    ours.call, ours.compiled = torch.compile(model, backend="aot_eager"), True
    prompt, forced = ids(1, 8)[0], ids(1, 6, seed=2)[0]
    with torch.no_grad():
        found = ours.forced(prompt, forced)
        expected = Variant("eager", original, False).forced(prompt, forced)
    assert close(found, expected, torch.bfloat16)
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]
