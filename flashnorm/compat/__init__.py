"""Every private name of torch and of transformers that flashnorm relies on, and nobody else uses.

A private name may change with any release. So each is a row here: what it is called there, what
stands for it in this package, what we rely on, and the versions that it was seen to do that in.
`tests/test_compat.py` has a check for every row, and says of one that fails who uses it.

- `torch_names` re-exports the objects themselves, so that no call takes longer.
- `transformers_names` has functions that import transformers when they are called; so have
  `gguf_names` and `quantizer_names`.
- `ATTRIBUTES` are torch's attributes of its own objects, which are read where they are needed, by
  their own names: they stand in what runs before every kernel.
"""

from __future__ import annotations

from dataclasses import dataclass

TORCH = ("2.11.0", "2.13.0", "2.14.1")
TRANSFORMERS = ("5.17.0", "5.23.0")


@dataclass(frozen=True)
class Private:
    """A private name: `theirs` in full, `ours` (empty: used as it is), and what we rely on."""

    theirs: str
    ours: str
    use: str
    seen: tuple[str, ...] = TORCH


def _attribute(theirs: str, use: str) -> Private:
    return Private(theirs, "", use)


ATTRIBUTES = (
    _attribute("torch.nn.Module._parameters", "the dict of a module's own parameters, or None"),
    _attribute("torch.nn.Module._buffers", "the dict of a module's own buffers, or None"),
    _attribute("torch.nn.Module._modules", "the dict of the modules in a module, in their order"),
    _attribute("torch.nn.Module._forward_hooks", "the dict that a handle removes its hook from"),
    _attribute("torch.nn.Module._forward_hooks_with_kwargs", "which of them are given kwargs"),
    _attribute("torch.nn.Module._forward_hooks_always_called", "which run after an error too"),
    _attribute("torch.nn.Module._forward_pre_hooks", "the dict of the hooks before a forward"),
    _attribute("torch.nn.Module._forward_pre_hooks_with_kwargs", "which of them are given kwargs"),
    _attribute("torch.nn.Module._backward_hooks", "the dict of the hooks after a backward"),
    _attribute("torch.nn.Module._backward_pre_hooks", "the dict of the hooks before a backward"),
    _attribute("torch.nn.Module._is_full_backward_hook", "of which kind the backward hooks are"),
    _attribute("torch.nn.Module._compiled_call_impl", "what `module.compile()` leaves in it"),
    _attribute("torch.nn.Module._save_to_state_dict", "what one module adds to a state dict"),
    _attribute("torch.nn.Module._load_from_state_dict", "what one module takes from a state dict"),
    _attribute("torch.compile._orig_mod", "the module inside the one that torch.compile makes"),
    _attribute("torch.Tensor._version", "a count that every write in place moves"),
    _attribute("torch.Tensor._base", "what a tensor is a view of, or None"),
    _attribute("torch.UntypedStorage._cdata", "a number that tensors share with their memory"),
    _attribute("torch.ops.aten._schema", "an operation's name, arguments, and what it writes"),
    _attribute("torch.autograd.forward_ad._current_level", "from 0 on in forward-mode derivatives"),
)
