"""The benchmark of folding before quantization: its rows are one function, its formats round."""

import pytest
import torch

pytest.importorskip("gguf", reason="the benchmark rounds as ggml does")
pytest.importorskip("torchao", reason="the benchmark quantizes with torchao")
transformers = pytest.importorskip("transformers", reason="the benchmark loads its models")

from benchmarks import fold_then_quantize as study  # noqa: E402

EPS = torch.finfo(torch.float32).eps


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=96,
        hidden_size=192,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=3,
        tie_word_embeddings=True,
    )
    model = transformers.LlamaForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.uniform_(-2, 2)
            else:
                parameter.mul_(4)
    folder = tmp_path_factory.mktemp("model")
    model.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def rows(place):
    windows = torch.randint(96, (3, 16), generator=torch.Generator().manual_seed(1))
    found = [
        row
        for noise in (None, 0)
        for row in study.study(place, windows, noise, [0, 1], list(study.FORMATS))
    ]
    return list(study.compared(found))


def test_every_row_is_one_function_before_it_is_quantized(rows):
    plain = [row for row in rows if row["format"] == "float32"]
    assert len(plain) == 8
    for row in plain:  # 2 layers of products of 256: a few roundings each, none of size 1e-3
        assert row["error"] < 2 * 256**0.5 * 4 * EPS
        assert row["row"] != "original" or row["error"] == 0


def test_formats_err_by_their_bits(rows):
    for row in rows:
        if row["format"] in ("int8 rows", "Q8_0"):
            assert 1e-4 < row["error"] < 0.05
        elif row["format"] != "float32":
            assert 0.02 < row["error"] < 1


def test_rows_are_compared_with_the_original_in_their_format(rows):
    assert all(row["change"] == 0 for row in rows if row["row"] == "original")
    changed = [row for row in rows if row["row"] == "folded" and row["format"] != "float32"]
    assert all(row["change"] != 0 for row in changed)  # float32 is only rounded, or not even that
    assert study.table(rows).count("| rotated, seed 1 |") == 2 * len(study.FORMATS)


@pytest.mark.parametrize("size", [1, 2, 12, 64, 192, 576])
def test_rotations_are_orthogonal_and_spread_evenly(size):
    q = study.rotation(size, 0)
    assert torch.allclose(q @ q.T, torch.eye(size, dtype=torch.float64), atol=1e-12)
    assert torch.allclose(q.abs(), torch.full_like(q, size**-0.5))
    assert size < 12 or not torch.equal(q, study.rotation(size, 1))


def test_what_is_off_the_grid_is_not_reproduced(place):
    """Weights that Q4_1 made are a fixed point of it; with noise they are not."""
    weight = study.FORMATS["Q4_1"](torch.randn(64, 192, generator=torch.Generator().manual_seed(0)))
    assert (study.FORMATS["Q4_1"](weight) - weight).abs().max() < 2e-3 * weight.abs().max()
    on, off = (study.load(place, noise, None, fold=False) for noise in (None, 0))
    for (_, a), (_, b) in zip(study.linears(on), study.linears(off), strict=True):
        assert 0 < float((a.weight - b.weight).norm() / a.weight.norm()) < 0.2


def test_no_rotation_passes_a_gain(place):
    with pytest.raises(ValueError, match="still has a gain"):
        study.load(place, None, 0, fold=False)
    with pytest.raises(ValueError, match="no Hadamard matrix"):
        study.hadamard(10)
