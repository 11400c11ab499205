"""Tiny models whose gains and biases are random, so that no identity hides a mistake."""

import copy

import torch
from transformers import AutoModelForCausalLM, GPTNeoXConfig, LlamaConfig, Qwen3Config

from tests.errors import relative, rounding
from tests.test_dyt import PublishedDyT

SIZES = {
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 256,
}
LLAMA = LlamaConfig(**SIZES, num_key_value_heads=2, tie_word_embeddings=True)
QWEN3 = Qwen3Config(**SIZES, num_key_value_heads=2, head_dim=16)
NEOX = GPTNeoXConfig(**SIZES)


def tiny(config=LLAMA, dtype=torch.float32, seed=0):
    torch.manual_seed(seed)
    # What is done to one model's config is not done to all that are made from it.
    model = AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=dtype).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.copy_(torch.randn_like(parameter))
            else:
                parameter.mul_(4)
    model.generation_config.pad_token_id = 0
    return model


def dyt(dtype=torch.float32):
    """A Llama whose norms are DyT, with random parameters."""
    model = tiny(LLAMA, torch.float32)
    torch.manual_seed(4)
    for path, module in list(model.named_modules()):
        if type(module).__name__.endswith("RMSNorm"):
            parent, _, name = path.rpartition(".")
            made = PublishedDyT(SIZES["hidden_size"])
            for parameter in made.parameters():
                torch.nn.init.normal_(parameter, 0.2, 0.1)  # larger ones saturate the softmax
            setattr(model.get_submodule(parent), name, made)
    return model.to(dtype).eval()


def ids(batch=1, length=5, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(1, 256, (batch, length), generator=generator)


def logits(model, tokens, **options):
    with torch.no_grad():
        return model(tokens, use_cache=False, **options).logits


def close(found, expected, dtype=torch.float32):
    """Within what rounding explains: each step rounds to the dtype, sums are in float32."""
    return relative(found, expected) < rounding(160, 15, dtype, torch.float32)
