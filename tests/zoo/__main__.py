"""Build and run the zoo: `python -m tests.zoo [type ...]`, one line per type and a summary."""

import sys
import time
import traceback
import warnings

import torch
from transformers.utils import logging

from tests.zoo import causal_lm_types, tiny_inputs, tiny_model


def run(model_type: str) -> tuple[int, int]:
    """Build and run one type: its numbers of parameters and of layers."""
    model = tiny_model(model_type)
    with torch.no_grad():
        logits = model(**tiny_inputs(model, model.config)).logits
    if not torch.isfinite(logits).all():
        raise ValueError("logits are not finite")
    if not 1e-3 < logits.std() < 1e3:
        raise ValueError(f"logits have a standard deviation of {logits.std():.3g}")
    layers = getattr(model.config.get_text_config(), "num_hidden_layers", 0)
    return sum(p.numel() for p in model.parameters()), layers


def main(types: list[str]) -> int:
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    warnings.simplefilter("ignore")
    begin, failed = time.perf_counter(), []
    for model_type in types or causal_lm_types():
        start = time.perf_counter()
        try:
            params, layers = run(model_type)
            outcome = f"{params:>9} {layers:>3}"
        except Exception as error:
            failed.append(model_type)
            outcome = f"{'error':>13} {type(error).__name__}: {str(error)[:160]!r}"
            if len(types) == 1:
                traceback.print_exc()
        print(f"{model_type:28} {time.perf_counter() - start:6.2f} s {outcome}", flush=True)
    total = len(types or causal_lm_types())
    seconds = time.perf_counter() - begin
    print(f"{total - len(failed)} of {total} ok in {seconds:.0f} s; failed: {failed}")
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
