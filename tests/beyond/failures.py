"""`python -m tests.beyond.failures [--out FILE] [--number N] [key ...]`: fail, and look around.

N failures (7) in each of inspect, fold_ and accelerate_ of every model of a list, of all libraries.
Appends a line of JSON per model to FILE (build/failures.jsonl); a run that was cut off goes on.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path

from .registry import by_key

LIMIT = 500.0  # seconds for one model
# Small ones, of every library.
MODELS = """
plain:blocks plain:frozen config plain:merging plain:counting plain:hooked plain:random
transformers:llama transformers:gpt2 transformers:bert transformers:gemma2
torch:TransformerEncoder pre-norm torch:TransformerDecoder post-norm
torchvision:VisionTransformer torchvision:SwinTransformer
torchaudio:Wav2Vec2Model layer_norm torchaudio:Conformer
vit-pytorch:simple_vit:SimpleViT vit-pytorch:vit:ViT vit-pytorch:cait:CaiT vit-pytorch:cvt:CvT
vit-pytorch:ats_vit:ViT
x-transformers:plain x-transformers:rmsnorm x-transformers:sandwich x-transformers:dyt
x-transformers:XTransformer
timm:test_byobnet timm:test_convnext timm:coat_tiny
diffusers:UNet2DConditionModel diffusers:AutoencoderKL diffusers:FluxTransformer2DModel
diffusers:SD3Transformer2DModel diffusers:WanTransformer3DModel diffusers:SanaTransformer2DModel
diffusers:Transformer2DModel
litgpt:Llama-3.2-1B litgpt:Gemma-2b litgpt:pythia-14m
torchtune:llama3 torchtune:gemma torchtune:qwen2
open-clip:CLIP sentence-transformers:bert
lucidrains:conformer:Conformer lucidrains:g_mlp_pytorch:gMLP lucidrains:mlp_mixer_pytorch:MLPMixer
monai:ViT monai:UNETR others:fair-esm ESM2 others:kornia VisionTransformer
others:speechbrain TransformerEncoder
"""


@dataclass
class Row:
    """What failures in one model left behind."""

    key: str
    tried: int = 0
    raised: int = 0
    violations: list[dict] = field(default_factory=list)
    cause: str = ""


def work(key: str, number: int) -> Row:
    from .injection import ACTIONS, inject
    from .measure import prepare

    prepare()
    row = Row(key)
    for action in ACTIONS:
        trial = inject(by_key(key), action, number)
        row.tried += trial.tried
        row.raised += trial.raised
        for violation in trial.violations:
            said = asdict(violation)
            said["place"]["failure"] = violation.place.failure.__name__
            row.violations.append(said)
    return row


def chosen() -> list[str]:
    """The keys of the list; a name may hold blanks, a library may not."""
    keys: list[str] = []
    for word in MODELS.split():
        if ":" in word:
            keys.append(word)
        else:
            keys[-1] += f" {word}"
    return _in_turn(keys)


def _in_turn(keys: list[str]) -> list[str]:
    """One of every library, then the next of every library."""
    seen: Counter[str] = Counter()
    turns = []
    for key in keys:
        library = key.partition(":")[0]
        turns.append((seen[library], key))
        seen[library] += 1
    return [key for _, key in sorted(turns, key=lambda turn: turn[0])]


def main(arguments: list[str]) -> int:
    from tests.zoo.parallel import spread

    parser = argparse.ArgumentParser()
    parser.add_argument("keys", nargs="*")
    parser.add_argument("--out", type=Path, default=Path("build/failures.jsonl"))
    parser.add_argument("--number", type=int, default=7)
    parser.add_argument("--processes", type=int, default=1)
    given = parser.parse_args(arguments)
    given.out.parent.mkdir(parents=True, exist_ok=True)
    lines = given.out.read_text().splitlines() if given.out.exists() else []
    rows = {row["key"]: Row(**row) for row in map(json.loads, lines)}
    keys = [key for key in given.keys or chosen() if key not in rows]
    with given.out.open("a") as out:
        for key, row, cause in spread(
            partial(work, number=given.number), keys, given.processes, LIMIT
        ):
            rows[key] = row or Row(key, cause=cause)
            print(json.dumps(asdict(rows[key])), file=out, flush=True)
            print(said(rows[key]), flush=True)
    print(total(list(rows.values())))
    return int(any(row.violations for row in rows.values()))


def said(row: Row) -> str:
    text = f"{row.key:44s} tried {row.tried:3d} raised {row.raised:3d} {row.cause[:100]}"
    kinds = Counter(f"{v['action']} at {v['where']}" for v in row.violations)
    return "\n  ".join([text + f" violations {len(row.violations)}", *kinds])


def total(rows: list[Row]) -> str:
    libraries = {row.key.partition(":")[0] for row in rows if row.tried}
    places = Counter(v["action"] for row in rows for v in row.violations)
    return (
        f"{sum(row.tried > 0 for row in rows)} models of {len(libraries)} libraries: "
        f"{sum(row.tried for row in rows)} failures, {sum(row.raised for row in rows)} of them "
        f"raised, {sum(places.values())} left something changed ({dict(places)})"
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
