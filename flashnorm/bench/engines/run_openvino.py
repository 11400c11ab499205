"""OpenVINO GenAI as an engine, in an environment of its own.

Of unquantized GGUF files its reader takes F16 only ("Unsupported quantization type" for F32 and
BF16, version 2026.4): the weights are rounded to that, and it computes in the dtype that is asked
for. Times are its own metrics: per output token, and to the first one.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import openvino
import openvino_genai

PRECISION = {"bf16": "bf16", "fp16": "f16", "fp32": "f32"}


class Engine:
    def __init__(self, model: str, threads: int, dtype: str) -> None:
        options = {
            "INFERENCE_NUM_THREADS": threads,
            "INFERENCE_PRECISION_HINT": PRECISION[dtype],
            "KV_CACHE_PRECISION": PRECISION[dtype],
        }
        self.options = options
        self.pipe = openvino_genai.LLMPipeline(model, "CPU", **options)

    def about(self) -> dict[str, Any]:
        return {
            "engine": f"OpenVINO GenAI {openvino_genai.__version__}",
            "note": f"F16 file, {self.options}",
        }

    def _run(self, ids: list[int], tokens: int) -> Any:
        config = openvino_genai.GenerationConfig()
        config.do_sample = False
        config.max_new_tokens = tokens
        config.min_new_tokens = tokens
        config.ignore_eos = True
        shape = np.array([ids], dtype=np.int64)
        inputs = openvino_genai.TokenizedInputs(
            openvino.Tensor(shape), openvino.Tensor(np.ones_like(shape))
        )
        return self.pipe.generate(inputs, config)

    def decode(self, prompt: list[int], tokens: int) -> tuple[float, list[int]]:
        found = self._run(prompt, tokens)
        return found.perf_metrics.get_tpot().mean / 1e3, list(map(int, found.tokens[0]))

    def prefill(self, ids: list[int]) -> float:
        return float(self._run(ids, 1).perf_metrics.get_ttft().mean / 1e3)


def make(asked: dict[str, Any]) -> Engine:
    """Its cache grows: `room` is not asked for."""
    return Engine(asked["model"], asked["threads"], asked["dtype"])
