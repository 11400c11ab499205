"""How fast `fold_checkpoint` streams and `verify --quick` reads, and whether kills change a fold.

Writes a synthetic Llama-shaped checkpoint (bf16, random weights and gains) into a work directory,
folds it and compares a fold of it (`verify_weights`), in fresh processes interleaved with `cp -r`
of the same directory on the same disk. Then it kills folds at random moments, resumes them and
compares hashes. Prints a table and writes benchmarks/results/streaming-<machine>-<date>.json. The
work directory is removed at the end.

    python benchmarks/streaming.py --workdir /path/on/the/disk --gigabytes 6.5 --rounds 5 --kills 20

Every run starts with what it reads dropped from the page cache (posix_fadvise; `--warm` leaves it
there). Comparing reads twice as many bytes as it is credited with, and writes none. A fold ends
with its files synced; so `cp` is given twice, alone and with a `sync` after.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import platform
import random
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import date
from pathlib import Path
from typing import Any

import torch

import flashnorm
from flashnorm.checkpoint.header import Entry, build_header
from flashnorm.plan import Consumer, Gain, Plan, Site, Span

HIDDEN, INNER, VOCAB, KV = 4096, 14336, 128256, 1024  # the shapes of an 8B model
HEAD = 128
SHARD_BYTES = int(1.5e9)
TARGET_RATIO, TARGET_BYTES = 0.60, 500_000_000

CHILD = """
import json, os, pathlib, signal, sys, time
from flashnorm import Plan, fold_checkpoint, verify_weights
plan = Plan.from_json(json.loads(pathlib.Path(sys.argv[3]).read_text()))
def status(key):
    for line in pathlib.Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key):
            return int(line.split()[1]) * 1024
limit = int(sys.argv[4])
before, start = status("VmRSS"), time.perf_counter()
def progress(done, total, shard):
    if done > limit:
        os.kill(os.getpid(), signal.SIGKILL)
if sys.argv[5] == "fold":
    fold_checkpoint(sys.argv[1], sys.argv[2], plan=plan, progress=progress if limit else None)
else:
    assert verify_weights(sys.argv[1], sys.argv[2], plan=plan).ok
seconds = time.perf_counter() - start
print(json.dumps({"seconds": seconds, "peak": status("VmHWM"), "imports": before}))
"""


def shapes(layers: int) -> dict[str, tuple[int, ...]]:
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCAB, HIDDEN)}
    for layer in (f"model.layers.{i}" for i in range(layers)):
        found[f"{layer}.input_layernorm.weight"] = (HIDDEN,)
        for name, rows in (("q", HIDDEN), ("k", KV), ("v", KV), ("o", HIDDEN)):
            found[f"{layer}.self_attn.{name}_proj.weight"] = (rows, HIDDEN)
        found[f"{layer}.post_attention_layernorm.weight"] = (HIDDEN,)
        found[f"{layer}.mlp.gate_proj.weight"] = (INNER, HIDDEN)
        found[f"{layer}.mlp.up_proj.weight"] = (INNER, HIDDEN)
        found[f"{layer}.mlp.down_proj.weight"] = (HIDDEN, INNER)
    found["model.norm.weight"] = (HIDDEN,)
    found["lm_head.weight"] = (VOCAB, HIDDEN)
    return found


def layers_for(gigabytes: float) -> int:
    base, one = (2 * sum(math.prod(shape) for shape in shapes(n).values()) for n in (0, 1))
    return max(1, round((gigabytes * 1e9 - base) / (one - base)))


def llama_plan(layers: int) -> Plan:
    def site(path: str, readers: list[str]) -> Site:
        spans = (Span(0, 0, HIDDEN),)
        consumers = tuple(Consumer(f"{name}.weight", 1, spans) for name in readers)
        weight = Gain(f"{path}.weight")
        return Site(path, "rms", HIDDEN, 1e-5, "folded", "", consumers, weight)

    sites = []
    for layer in (f"model.layers.{i}" for i in range(layers)):
        attention = [f"{layer}.self_attn.{name}_proj" for name in "qkv"]
        sites.append(site(f"{layer}.input_layernorm", attention))
        mlp = [f"{layer}.mlp.{name}_proj" for name in ("gate", "up")]
        sites.append(site(f"{layer}.post_attention_layernorm", mlp))
    return Plan((*sites, site("model.norm", ["lm_head"])))


def raw_bytes(values: torch.Tensor) -> bytes:
    return values.bfloat16().view(torch.uint8).numpy().tobytes()


def make_checkpoint(path: Path, layers: int, shard_bytes: int = SHARD_BYTES) -> None:
    """Shards of about `shard_bytes`; each tensor starts somewhere else in one block of noise."""
    path.mkdir()
    rng = torch.Generator().manual_seed(0)
    noise = raw_bytes(0.02 * torch.randn(1 << 24, generator=rng))
    parts: list[list[Entry]] = [[]]
    size = 0
    for name, shape in shapes(layers).items():
        count = 2 * math.prod(shape)
        if size + count > shard_bytes and parts[-1]:
            parts.append([])
            size = 0
        parts[-1].append(Entry(name, "BF16", shape, size, size + count))
        size += count
    names = [f"model-{i + 1:05d}-of-{len(parts):05d}.safetensors" for i in range(len(parts))]
    for name, entries in zip(names, parts, strict=True):
        with open(path / name, "wb") as file:
            file.write(build_header(entries, {"format": "pt"}).raw)
            for entry in entries:
                if len(entry.shape) == 1:
                    gain = 1 + 0.3 * torch.randn(entry.shape, generator=rng)
                    file.write(raw_bytes(gain))
                    continue
                start, left = 2 * int(torch.randint(1 << 20, (1,), generator=rng)), entry.nbytes
                while left:
                    piece = memoryview(noise)[start : start + left]
                    file.write(piece)
                    left, start = left - len(piece), 0
            os.fsync(file.fileno())
    total = sum(entry.nbytes for part in parts for entry in part)
    where = {e.name: name for name, part in zip(names, parts, strict=True) for e in part}
    index = {"metadata": {"total_size": total}, "weight_map": where}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    config = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": VOCAB,
        "hidden_size": HIDDEN,
        "intermediate_size": INNER,
        "num_hidden_layers": layers,
        "num_attention_heads": HIDDEN // HEAD,
        "num_key_value_heads": KV // HEAD,
    }
    (path / "config.json").write_text(json.dumps(config))


def drop_cache(path: Path) -> None:
    os.sync()
    for file in path.iterdir():
        descriptor = os.open(file, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def started(work: Path, name: str, limit: int = 0, what: str = "fold") -> subprocess.Popen[str]:
    paths = [str(work / part) for part in ("src", name, "plan.json")]
    command = [sys.executable, "-c", CHILD, *paths, str(limit), what]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def timed(work: Path, name: str, what: str = "fold") -> dict[str, float]:
    process = started(work, name, what=what)
    output, _ = process.communicate()
    if process.returncode:
        raise SystemExit(f"the {what} failed")
    return json.loads(output)


def timed_copy(work: Path) -> tuple[float, float]:
    start = time.perf_counter()
    subprocess.run(["cp", "-r", work / "src", work / "copy"], check=True)
    copied = time.perf_counter() - start
    os.sync()
    synced = time.perf_counter() - start
    shutil.rmtree(work / "copy")
    return copied, synced


def rounds(work: Path, count: int, warm: bool) -> list[dict[str, float]]:
    found = []
    timed(work, "folded")
    for i in range(count):
        row: dict[str, float] = {}
        for what in ("copy", "fold", "check") if i % 2 else ("check", "fold", "copy"):
            os.sync()
            if not warm:
                drop_cache(work / "src")
                drop_cache(work / "folded")
            if what == "copy":
                row["copy"], row["copy_sync"] = timed_copy(work)
            elif what == "check":
                checked = timed(work, "folded", "check")
                row["check"], row["check_peak"] = checked["seconds"], checked["peak"]
            else:
                row.update(timed(work, "dst"))
                shutil.rmtree(work / "dst")
        print(f"round {i + 1}: " + ", ".join(f"{k} {v:.4g}" for k, v in row.items()), flush=True)
        found.append(row)
    shutil.rmtree(work / "folded")
    return found


def hashes(path: Path) -> dict[str, str]:
    found = {}
    for file in sorted(path.iterdir()):
        digest = hashlib.blake2b()
        with open(file, "rb") as reader:
            while chunk := reader.read(1 << 24):
                digest.update(chunk)
        found[file.name] = digest.hexdigest()
    return found


def kills(work: Path, count: int, size: int) -> dict[str, int]:
    """Kill folds (SIGKILL) at random bytes, resume each, compare with an undisturbed fold."""
    timed(work, "whole")
    wanted, source = hashes(work / "whole"), hashes(work / "src")
    rng, killed, resumed = random.Random(0), 0, 0
    for i in range(count):
        process = started(work, "dst", limit=rng.randrange(1, int(0.99 * size)))
        killed += process.wait() != 0
        partial = work / ".dst.flashnorm-partial"
        resumed += partial.exists()
        if not (work / "dst").exists():
            timed(work, "dst")
        if hashes(work / "dst") != wanted or partial.exists():
            raise SystemExit(f"kill {i + 1}: the resumed fold differs")
        shutil.rmtree(work / "dst")
    if hashes(work / "src") != source:
        raise SystemExit("the source changed")
    return {"started": count, "killed": killed, "resumed": resumed, "identical": count}


def machine() -> dict[str, Any]:
    info = Path("/proc/cpuinfo").read_text()
    found = re.search(r"model name\s*: (.*)", info)
    return {
        "cpu": found.group(1) if found else platform.machine(),
        "cores": os.cpu_count(),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "flashnorm": flashnorm.__version__,
    }


def summary(rows: list[dict[str, float]], size: int, largest: int) -> dict[str, float]:
    fold, copy, synced = (
        statistics.median(row[key] for row in rows) for key in ("seconds", "copy", "copy_sync")
    )
    check = statistics.median(row["check"] for row in rows)
    peak = max(row["peak"] for row in rows)
    return {
        "bytes": size,
        "largest_tensor": largest,
        "fold_seconds": fold,
        "copy_seconds": copy,
        "copy_sync_seconds": synced,
        "check_seconds": check,
        "check_of_copy": statistics.median(row["copy"] / row["check"] for row in rows),
        "check_peak_bytes": max(row["check_peak"] for row in rows),
        "speed_of_copy": statistics.median(row["copy"] / row["seconds"] for row in rows),
        "speed_of_copy_sync": statistics.median(row["copy_sync"] / row["seconds"] for row in rows),
        "peak_bytes": peak,
        "peak_over_imports": peak - max(row["imports"] for row in rows),
        "peak_limit": largest + TARGET_BYTES,
    }


def table(result: dict[str, float]) -> str:
    gb = result["bytes"] / 1e9
    lines = [
        f"{'':26}{'seconds':>10}{'GB/s':>8}",
        *(
            f"{label:26}{result[key]:10.2f}{gb / result[key]:8.2f}"
            for label, key in (
                ("fold_checkpoint, synced", "fold_seconds"),
                ("verify_weights", "check_seconds"),
                ("cp -r", "copy_seconds"),
                ("cp -r, then sync", "copy_sync_seconds"),
            )
        ),
        f"speed: {result['speed_of_copy']:.0%} of cp, {result['speed_of_copy_sync']:.0%} of cp and "
        f"sync (target {TARGET_RATIO:.0%} of cp)",
        f"comparing: {result['check_of_copy']:.0%} of cp (target {TARGET_RATIO:.0%}), peak memory "
        f"{result['check_peak_bytes'] / 1e6:.0f} MB",
        f"peak memory of a fold {result['peak_bytes'] / 1e6:.0f} MB, of it "
        f"{result['peak_over_imports'] / 1e6:.0f} MB over the imports (target below "
        f"{result['peak_limit'] / 1e6:.0f} MB)",
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workdir", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--gigabytes", type=float, default=6.5)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--warm", action="store_true", help="leave the source in the page cache")
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    layers = layers_for(options.gigabytes)
    with tempfile.TemporaryDirectory(dir=options.workdir, prefix="streaming-") as name:
        work = Path(name)
        (work / "plan.json").write_text(json.dumps(llama_plan(layers).to_json()))
        make_checkpoint(work / "src", layers)
        size = sum(file.stat().st_size for file in (work / "src").iterdir())
        print(f"{size / 1e9:.2f} GB, {layers} layers", flush=True)
        rows = rounds(work, options.rounds, options.warm)
        result: dict[str, Any] = summary(rows, size, 2 * VOCAB * HIDDEN)
        print(table(result), flush=True)
        result["kills"] = kills(work, options.kills, size)
        print(f"kills: {result['kills']}")
    cache = "warm" if options.warm else "source dropped before each run"
    here = machine()
    record = {"machine": here, "page_cache": cache, "rounds": rows, "result": result}
    slug = re.sub(r"[^a-z0-9]+", "-", here["cpu"].lower()).strip("-")
    options.results.mkdir(parents=True, exist_ok=True)
    file = options.results / f"streaming-{slug}-{date.today()}.json"
    file.write_text(json.dumps(record, indent=2) + "\n")
    print(file)


if __name__ == "__main__":
    main()
