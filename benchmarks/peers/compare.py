"""Put the results of all environments into one table.

    python -m benchmarks.peers.compare --work DIR --out benchmarks/results/peers-YYYY-MM-DD

Writes `<out>.json` and `<out>.md`. A run is right where its float64 error stays below `LIMIT` times
what one float32 rounding of every weight does to the same logits, measured for each model.
"""

from __future__ import annotations

import argparse
import json
import subprocess
from collections import Counter
from pathlib import Path

LIMIT = 10  # a fold rounds each weight once, some twice
PEERS = {
    "transformer-tricks": "transformer-tricks",
    "transformer-lens-bridge": "TransformerLens, TransformerBridge",
    "transformer-lens-hooked": "TransformerLens, HookedTransformer",
}
UNKNOWN = ("Could not determine supported architecture", "is not currently supported")
DECLINED = ("does not support", "could not be recorded")
ORDER = ["right", "wrong", "nothing folded", "refused", "raised", "unknown type"]
Row = dict


def rows_of(work: Path) -> list[Row]:
    rows = []
    for path in sorted(work.glob("m*")):
        if (path / "about.json").exists():
            parts = {name: _read(path / f"{name}.json") for name in ("flashnorm", *PEERS)}
            rows.append(_row(_read(path / "about.json"), parts))
    return rows


def _read(path: Path) -> dict:
    return json.loads(path.read_text())


def _row(about: dict, parts: dict) -> Row:
    limit = LIMIT * about["rounding"]
    ours = parts["flashnorm"]
    bridge, hooked = (parts[f"transformer-lens-{name}"] for name in ("bridge", "hooked"))
    return {
        "type": about["name"],
        "architecture": about["architecture"],
        "rounding": about["rounding"],
        "flashnorm": {way: _judged(r, limit) for way, r in ours.items()},
        "transformer-tricks": _judged(parts["transformer-tricks"], limit),
        "transformer-lens-bridge": {run: _judged(r, limit) for run, r in bridge.items()},
        "transformer-lens-hooked": {run: _judged(r, limit) for run, r in hooked.items()},
    }


def _judged(result: dict, limit: float) -> dict:
    folded = result.get("gains_folded", result.get("changed", result.get("folded")))
    judged = {k: v for k, v in result.items() if k != "reasons"}
    judged["verdict"] = verdict(result, limit, folded)
    if judged["verdict"] == "unknown type":
        del judged["message"]  # a list of all known ones
    return judged


def verdict(result: dict, limit: float, folded: int | None) -> str:
    """One of `ORDER`; `folded` is None where it is not known how many gains were."""
    if result["outcome"] == "raised":
        if any(text in result["message"] for text in UNKNOWN):
            return "unknown type"
        return "refused" if any(t in result["message"] for t in DECLINED) else "raised"
    if not result["error_truth"] <= limit:
        return "wrong"
    return "nothing folded" if folded == 0 else "right"


def counted(rows: list[Row], name: str, run: str | None = None) -> str:
    found = Counter((r[name][run] if run else r[name])["verdict"] for r in rows)
    return ", ".join(f"{found[v]} {v}" for v in ORDER if found[v])


def summary(rows: list[Row], versions: dict) -> list[str]:
    tricks = [r["transformer-tricks"] for r in rows]
    agree = [t["from_flashnorm"] for t in tricks if t["verdict"] == "right"]
    lens = versions["transformer-lens-bridge"]["transformer-lens"]
    hooked = versions["transformer-lens-hooked"]["transformer-lens"]
    return [
        f"- flashnorm {versions['flashnorm']['flashnorm']}, `fold_` and `save_pretrained`: "
        f"{counted(rows, 'flashnorm', 'memory')}; `fold_checkpoint`: "
        f"{counted(rows, 'flashnorm', 'disk')}; `fold_(untie=True, center=True)`: "
        f"{counted(rows, 'flashnorm', 'all')}.",
        f"- transformer-tricks {versions['transformer-tricks']['transformer-tricks']}, "
        f"`flashify`: {counted(rows, 'transformer-tricks')}. Where it is right, its model and ours "
        f"differ by at most {max(agree):.0e}; {agree.count(0)} of {len(agree)} give the same "
        "logits bit for bit.",
        f"- TransformerLens {lens}, `TransformerBridge`, `fold_ln`: "
        f"{counted(rows, 'transformer-lens-bridge', 'folded')}; with writing weights centered: "
        f"{counted(rows, 'transformer-lens-bridge', 'centered')}; converted with nothing folded: "
        f"{counted(rows, 'transformer-lens-bridge', 'converted')}.",
        f"- TransformerLens {hooked}, `HookedTransformer`, `fold_ln`: "
        f"{counted(rows, 'transformer-lens-hooked', 'folded')}; with writing weights centered: "
        f"{counted(rows, 'transformer-lens-hooked', 'centered')}; converted with nothing folded: "
        f"{counted(rows, 'transformer-lens-hooked', 'converted')}.",
    ]


def page(rows: list[Row], left_out: dict[str, str], versions: dict, date: str) -> str:
    base = versions["flashnorm"]
    lines = [
        "# flashnorm beside transformer-tricks and TransformerLens",
        "",
        f"Made on {date} by `benchmarks/peers` with torch {base['torch']} and transformers "
        f"{base['transformers']} in every environment: {len(rows)} causal-LM types as tiny models "
        "with random gains and biases, saved once as float32 checkpoints. Errors are "
        "max |Δlogit| / max |logit| against the original, in float64 throughout (`float32`: in "
        "stock float32). A run is *right* where its error stays below "
        f"{LIMIT} times what one float32 rounding of each weight does to the same logits. "
        "*folded* counts gains that became one, of all norms.",
        "",
        *summary(rows, versions),
        "",
        "## Where a peer is wrong, and what flashnorm does on the same checkpoint",
        "",
        "| type | peer | its error | flashnorm folded | error |",
        "|---|---|---|---|---|",
        *_wrong(rows),
        "",
        "## All types",
        "",
        "| type | flashnorm folded | error | float32 | on disk | untied: folded, centered | error "
        "| transformer-tricks | TransformerBridge, fold | folded | fold, center "
        "| HookedTransformer, fold | fold, center |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|",
        *map(_line, rows),
        "",
        "Left out, because transformers cannot save and reload the tiny model as a causal LM: "
        + "; ".join(f"{name} ({why})" for name, why in sorted(left_out.items()))
        + ".",
        "",
    ]
    return "\n".join(lines)


def _wrong(rows: list[Row]) -> list[str]:
    lines = []
    for row in rows:
        ours = f"{_ours(row)} | {row['flashnorm']['memory']['error_truth']:.0e} |"
        for key, title in PEERS.items():
            runs = row[key] if key.startswith("transformer-lens") else {"folded": row[key]}
            wrong = {run: r for run, r in runs.items() if r["verdict"] == "wrong"}
            if wrong:
                worst = max(r["error_truth"] for r in wrong.values())
                where = f" ({', '.join(wrong)})" if len(runs) > 1 else ""
                lines.append(f"| {row['type']} | {title}{where} | {worst:.2g} | {ours}")
    return lines


def _ours(row: Row) -> str:
    return f"{row['flashnorm']['memory']['folded']} of {row['flashnorm']['memory']['sites']}"


def _line(row: Row) -> str:
    ours, bridge, hooked = (row[k] for k in ("flashnorm", *list(PEERS)[1:]))
    cells = [
        row["type"],
        _ours(row),
        _cell(ours["memory"]),
        f"{ours['memory']['error_float32']:.0e}",
        _cell(ours["disk"]),
        f"{ours['all'].get('folded', '')}, {ours['all'].get('centered', '')}",
        _cell(ours["all"]),
        _cell(row["transformer-tricks"]),
        _cell(bridge["folded"]),
        str(bridge["folded"].get("gains_folded", "")),
        _cell(bridge["centered"]),
        _cell(hooked["folded"]),
        _cell(hooked["centered"]),
    ]
    return f"| {' | '.join(cells)} |"


def _cell(result: dict) -> str:
    if result["verdict"] in ("right", "wrong"):
        mark = "**wrong** " if result["verdict"] == "wrong" else ""
        return f"{mark}{result['error_truth']:.0e}"
    if result["verdict"] == "raised":
        return result["error_class"]
    return result["verdict"]


def dump(facts: dict, rows: list[Row]) -> str:
    """JSON with one line per model."""
    lines = ",\n".join(json.dumps(row) for row in rows)
    return f'{json.dumps(facts)[:-1]}, "rows": [\n{lines}\n]}}\n'


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--commit", help="of flashnorm; default the one checked out")
    options = parser.parse_args()
    rows = rows_of(options.work)
    left = [_read(path) for path in sorted(options.work.glob("m*/left_out.json"))]
    left_out = {entry["name"]: entry["error_class"] for entry in left}
    versions = {
        name: _read(options.work / f"versions-{name}.json") for name in ("flashnorm", *PEERS)
    }
    if len({(v["torch"], v["transformers"]) for v in versions.values()}) > 1:
        raise SystemExit(f"torch or transformers differ between environments: {versions}")
    facts = {
        "versions": versions,
        "commit": options.commit or _commit(),
        "left_out": left_out,
    }
    options.out.with_suffix(".json").write_text(dump(facts, rows))
    date = options.out.name.removeprefix("peers-")
    options.out.with_suffix(".md").write_text(page(rows, left_out, versions, date))
    print("\n".join(summary(rows, versions)))


def _commit() -> str:
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


if __name__ == "__main__":
    main()
