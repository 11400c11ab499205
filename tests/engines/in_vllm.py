"""One model in vLLM, in a process of its own: greedy tokens, their logits, a digest of its weights.

Asked in JSON as the first argument (`model`, `prompts`, and options of vllm.LLM), answered on a
line of stdout.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import time
from typing import Any

import torch

os.environ |= {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "HF_HUB_OFFLINE": "1",
}


def digests(model: torch.nn.Module) -> dict[str, str]:
    """What each parameter holds, bit by bit."""
    found = {}
    for name, value in model.named_parameters():
        flat = value.detach().contiguous().reshape(-1).view(torch.uint8)
        found[name] = hashlib.sha256(flat.numpy().tobytes()).hexdigest()
    return found


def digests_after_loading() -> dict[str, str]:
    """What each parameter holds as loaded; vLLM packs weights for its kernels after that."""
    from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

    found: dict[str, str] = {}
    load = DefaultModelLoader.load_weights

    def load_weights(self: Any, model: torch.nn.Module, model_config: Any) -> None:
        load(self, model, model_config)
        found.update(digests(model))

    DefaultModelLoader.load_weights = load_weights
    return found


def bind(processes: int) -> None:
    """A core for each process, which vLLM finds by itself only where each has memory of its own."""
    cores = sorted(os.sched_getaffinity(0))
    os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "|".join(
        str(cores[i % len(cores)]) for i in range(processes)
    )


def main() -> None:
    asked: dict[str, Any] = json.loads(sys.argv[1])
    if processes := asked.get("tensor_parallel_size"):
        bind(processes)

    from vllm import LLM, SamplingParams
    from vllm import __version__ as version

    weights = digests_after_loading()
    prompts = asked.pop("prompts")
    tokens, rounds = asked.pop("tokens", 8), asked.pop("rounds", 1)
    llm = LLM(**{"max_model_len": 128, "seed": 0, "disable_log_stats": True, **asked})
    options = SamplingParams(temperature=0, max_tokens=tokens, min_tokens=tokens, logprobs=1)
    given: Any = [{"prompt_token_ids": prompt} for prompt in prompts]
    seconds = []
    for _ in range(rounds):
        start = time.perf_counter()
        outputs = llm.generate(given, options, use_tqdm=False)
        seconds.append(time.perf_counter() - start)
    answers = [output.outputs[0] for output in outputs]
    result = {
        "version": version,
        "tokens": [list(answer.token_ids) for answer in answers],
        "logprobs": [
            [step[token].logprob for step, token in zip(a.logprobs, a.token_ids, strict=True)]
            for a in answers
        ],
        "weights": weights,
        "seconds": seconds,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
