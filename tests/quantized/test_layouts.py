"""What layouts read is what the libraries themselves unpack, in the memory that they hold."""

import subprocess
import sys

import pytest
import torch
from torch import nn

from flashnorm.kernels.weights import Weight
from flashnorm.quantized import layout
from flashnorm.quantized.layout import Held, Unreadable
from tests.quantized import columns
from tests.quantized.models import GROUP, ORIGINS, N, toy

# Of float32: a scale, its product, the zero, and one more where statistics are nested.
ROUNDINGS = 4 * torch.finfo(torch.float32).eps


def unpacked(module: nn.Module) -> torch.Tensor:
    """W [k, n] as the module's own library makes it."""
    if isinstance(module, (columns.GptqLinear, columns.AwqLinear)):
        return module.dense().T
    if hasattr(module, "quantization_scheme"):
        from compressed_tensors.compressors import BaseCompressor

        scheme = module.quantization_scheme
        kind = BaseCompressor.get_value_from_registry(scheme.format.value)
        return kind.decompress(dict(module._parameters), scheme)["weight"]
    if hasattr(module.weight, "quant_state"):
        import bitsandbytes

        data = module.weight.data
        return bitsandbytes.functional.dequantize_4bit(data, module.weight.quant_state)
    return module.weight.dequantize()


@pytest.mark.parametrize("origin", ORIGINS)
def test_a_layout_reads_what_its_library_unpacks(origin):
    model = ORIGINS[origin](toy())
    for module in (model.q, model.out, model.mlp.down):
        held = layout.find(module)
        assert isinstance(held, Held), held
        weight, expected = held.read(module), unpacked(module).double()
        assert weight.unfit() == ""
        assert weight.shape == expected.shape
        found = weight.dequantized()
        assert (found - expected).abs().max() <= ROUNDINGS * expected.abs().max()
        assert bool(held.bias) == (getattr(module, "bias", None) is not None)


@pytest.mark.parametrize("origin", ORIGINS)
def test_values_and_scales_are_never_copied(origin):
    module = ORIGINS[origin](toy()).q
    held = layout.find(module)
    values, scales, *_ = held.tensors(module)
    first, second = held.read(module), held.read(module)
    assert first.values.data_ptr() == values.data_ptr()
    assert all(
        a.data_ptr() == b.data_ptr() for a, b in zip(first.tensors(), second.tensors(), strict=True)
    )
    if "nested" not in origin:  # its scales are quantized too
        assert first.scales.data_ptr() == scales.data_ptr()


@pytest.mark.parametrize("origin", ["gptq", "awq", "bitsandbytes nf4 nested"])
def test_what_is_made_of_a_tensor_follows_it(origin):
    module = ORIGINS[origin](toy()).q
    held = layout.find(module)
    before = held.read(module).dequantized()
    source = module.qzeros if "nested" not in origin else module.weight.quant_state.absmax
    source.copy_(source.roll(1, 0))
    after = held.read(module).dequantized()
    assert not torch.equal(before, after)
    assert (after - unpacked(module).double()).abs().max() <= ROUNDINGS * after.abs().max()


def test_the_zeros_of_a_gptq_file_are_one_less():
    layer = toy().q
    made = [columns.GptqLinear.of(layer, GROUP, version) for version in (1, 2)]
    first, second = (layout.find(module).read(module).dequantized() for module in made)
    assert torch.equal(first, second)
    made[0].version = 2
    third = layout.find(made[0]).read(made[0]).dequantized()
    assert (third - second).abs().min() > 0


def gptq(**changes) -> nn.Module:
    module = columns.GptqLinear.of(toy().q, GROUP)
    for name, value in changes.items():
        setattr(module, name, value)
    return module


def torchao(config: str) -> nn.Module:
    pytest.importorskip("torchao", reason="torchao is not installed")
    from torchao import quantization

    model = toy()
    quantization.quantize_(model, getattr(quantization, config)())
    return model.q


def eight_bits() -> nn.Module:
    library = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    return library.nn.Linear8bitLt(N, N)


def four_bits(n: int, k: int) -> nn.Module:
    library = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    return library.nn.Linear4bit(n, k, quant_type="nf4").to("cpu")


def compressed(bits: int, form: str, activations: bool = False) -> nn.Module:
    pytest.importorskip("compressed_tensors", reason="compressed-tensors is not installed")
    from compressed_tensors.quantization import QuantizationArgs

    from tests.quantized.compressing import compress

    more = {"input_activations": QuantizationArgs(num_bits=8, dynamic=True)} if activations else {}
    return compress(toy(), bits, "int", None, True, form, **more).q


def shuffled() -> torch.Tensor:
    return (torch.arange(N, dtype=torch.int32) // GROUP).roll(3)


REFUSED = {
    "act-order": (lambda: gptq(g_idx=shuffled()), "order of the activations"),
    "three bits": (lambda: gptq(bits=3), "it has 3 bits"),
    "an adapter": (lambda: gptq(adapter=object()), "adapter is set"),
    "a rotation": (lambda: gptq(online_full_had=True), "online_full_had is set"),
    "torchao int8 x": (lambda: torchao("Int8DynamicActivationInt8WeightConfig"), "quantizes what"),
    "torchao int8 x, int4": (
        lambda: torchao("Int8DynamicActivationIntxWeightConfig"),
        "quantizes what",
    ),
    "Linear8bitLt": (eight_bits, "quantizes what it multiplies"),
    "blocks that end in the middle of a row": (lambda: four_bits(96, 64), "do not divide"),
    "compressed x": (lambda: compressed(8, "int-quantized", True), "quantizes what it multiplies"),
    "compressed in words of 8": (lambda: compressed(8, "pack-quantized"), "packed in 8 bits"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_read_says_why(case):
    make, reason = REFUSED[case]
    found = layout.find(make())
    assert isinstance(found, str)
    assert reason in found


def test_a_layer_that_begins_to_scale_x_is_no_longer_read():
    module = ORIGINS["torchao int8"](toy()).q
    held = layout.find(module)
    module.weight.act_pre_scale = torch.ones(N)
    with pytest.raises(Unreadable, match="quantizes what it multiplies"):
        held.tensors(module)


def test_a_layer_that_bitsandbytes_has_packed_anew_says_so():
    module = ORIGINS["bitsandbytes nf4"](toy()).q
    held = layout.find(module)
    module.weight.quant_state.packing_format_for_cpu = True
    with pytest.raises(Unreadable, match="packed its weight anew"):
        held.read(module)
    assert "accelerate_ before the model runs" in layout.find(module)


def test_dense_layers_are_none_of_this():
    for module in toy().modules():
        assert layout.find(module) is None


def test_a_tensor_subclass_plugs_in_by_what_it_holds():
    from flashnorm.kernels.formats.groups import INT8_GROUPS
    from flashnorm.quantized import subclass

    class Signs(torch.Tensor):
        """[k, n] int8, held as it is."""

    def tensors(tensor):
        return (tensor.as_subclass(torch.Tensor),)

    def read(tensor):
        return Weight(tensors(tensor)[0], INT8_GROUPS, None, *tensor.shape)

    def inside(tensor):
        return subclass.Inside("signs", tensors, read) if type(tensor) is Signs else None

    layer = nn.Linear(N, N)
    layer.weight = nn.Parameter(torch.ones(N, N, dtype=torch.int8).as_subclass(Signs), False)
    del layer._parameters["weight"]
    layer._parameters["weight"] = torch.ones(N, N, dtype=torch.int8).as_subclass(Signs)
    assert layout.find(layer) is None
    subclass.register(inside)
    try:
        held = layout.find(layer)
        assert held.origin == "signs"
        assert torch.equal(held.read(layer).dequantized(), torch.ones(N, N).double())
    finally:
        subclass._known.remove(inside)


def test_no_library_is_imported():
    names = ["torchao", "bitsandbytes", "compressed_tensors", "gptqmodel"]
    code = "import sys, flashnorm.runtime.accelerate\n"
    code += f"print([n for n in {names} if n in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
