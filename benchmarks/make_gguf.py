"""Quantized GGUF files of the demo's model, made by llama.cpp from its float32 numbers.

    python -m benchmarks.make_gguf OUT --python PEERS/llama/bin/python --types Q8_0 Q4_0 Q4_K_M
    python -m benchmarks.make_gguf OUT --python .. --source OUT/llama-1b-bf16.gguf

`--source` is another model's file, beside which the others are written.

`--python` is one that has llama-cpp-python; its own process quantizes. Where a row of a matrix is
no multiple of 256, llama.cpp writes another format in place of a k format: the file says which.
"""

from __future__ import annotations

import argparse
import subprocess
from collections import Counter
from pathlib import Path

import gguf

from benchmarks.make_models import smollm2

QUANTIZE = """
import sys, llama_cpp
source, target, kind, threads = sys.argv[1:]
params = llama_cpp.llama_model_quantize_default_params()
params.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{kind}")
params.nthread = int(threads)
sys.exit(llama_cpp.llama_model_quantize(source.encode(), target.encode(), params))
"""


def quantized(source: Path, kind: str, python: str, threads: int) -> Path:
    """A GGUF file in another format beside the source; complete or not at all."""
    target = named(source, kind)
    part = target.with_suffix(".part")
    command = [python, "-c", QUANTIZE, str(source), str(part), kind, str(threads)]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    if ran.returncode:
        raise SystemExit(f"llama.cpp wrote no {kind}: {ran.stderr[-2000:]}")
    part.rename(target)
    return target


def named(source: Path, kind: str) -> Path:
    return source.with_name(f"{source.stem.rpartition('-')[0]}-{kind.lower()}.gguf")


def formats(file: Path) -> str:
    """How many tensors of each format are in a file."""
    held = Counter(tensor.tensor_type.name for tensor in gguf.GGUFReader(file).tensors)
    return ", ".join(f"{count} {name}" for name, count in held.most_common())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--python", required=True, help="one that has llama-cpp-python")
    parser.add_argument("--source", type=Path, help="instead of the demo's model")
    parser.add_argument("--types", nargs="*", default=["Q8_0", "Q4_0", "Q4_K_M"])
    parser.add_argument("--threads", type=int, default=2)
    given = parser.parse_args()
    given.folder.mkdir(parents=True, exist_ok=True)
    source = given.source or given.folder / "smollm2-fp32.gguf"
    if not source.exists():
        smollm2(given.folder, "fp32")
    for kind in given.types:
        target = named(source, kind)
        if not target.exists():
            quantized(source, kind, given.python, given.threads)
        print(target, target.stat().st_size, formats(target))


if __name__ == "__main__":
    main()
