"""Build and run the zoo: `python -m tests.zoo [name ...]`, one line each and a summary."""

import sys
import time
import traceback
import warnings

import torch
from transformers.utils import logging

from . import causal_lm_types, tiny_inputs, tiny_model, variants


def run(name: str) -> tuple[int, int]:
    """Build and run one model: its numbers of parameters and of layers."""
    model = tiny_model(name)
    with torch.no_grad():
        logits = model(**tiny_inputs(model, model.config)).logits
    if not torch.isfinite(logits).all():
        raise ValueError("logits are not finite")
    if not 1e-3 < logits.std() < 1e3:
        raise ValueError(f"logits have a standard deviation of {logits.std():.3g}")
    layers = getattr(model.config.get_text_config(), "num_hidden_layers", 0)
    return sum(p.numel() for p in model.parameters()), layers


def main(names: list[str]) -> int:
    names = names or causal_lm_types() + variants()
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    warnings.simplefilter("ignore")
    begin, failed = time.perf_counter(), []
    for name in names:
        start = time.perf_counter()
        try:
            params, layers = run(name)
            outcome = f"{params:>9} {layers:>3}"
        except Exception as error:
            failed.append(name)
            outcome = f"{'error':>13} {type(error).__name__}: {str(error)[:160]!r}"
            if len(names) == 1:
                traceback.print_exc()
        print(f"{name:28} {time.perf_counter() - start:6.2f} s {outcome}", flush=True)
    total = len(names)
    seconds = time.perf_counter() - begin
    print(f"{total - len(failed)} of {total} ok in {seconds:.0f} s; failed: {failed}")
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
