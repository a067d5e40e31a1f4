"""The table of supported models, as Markdown: `python -m sweep.table results.json docs/supported_models.md`."""

from __future__ import annotations

import argparse
import json
from collections import Counter
from pathlib import Path
from typing import Any

TIERS = {
    "rows": "every method",
    "sublayers": "whole sublayers",
    "refused": "refused",
    "wrong": "wrong",
    "crashed": "crashed",
    "cannot be built": "not examined",
}
_DROPPED = ("attention", "mlp", "block")
_HEAD = """# Supported models

Every text model class of transformers {transformers}, examined with torch {torch}: a tiny random model of the class
runs unpatched and patched, in float32 and bfloat16, with left, right and no padding, with and without a cache.

- **every method**: token policies too, which compute a sublayer for chosen tokens only.
- **whole sublayers**: what computes a sublayer for all tokens or for none (`LayerDrop`, `EarlyExit`), and `TempScale`
  where there is a scale.
- **refused**: `patch` raises `UnsupportedModelError` and leaves the model as it was.

A name with a colon is a class under settings of its own, or an encoder's layers as a decoder.
`slimformer.support(model)` says the same of a model in hand, layer by layer.
"""


def markdown(content: dict[str, Any]) -> str:
    """The page for the results that `python -m sweep --output` writes."""
    results = content["results"]
    tiers = [tier for tier in TIERS if any(result["outcome"] == tier for result in results)]
    lines = [
        _HEAD.format(**content["versions"]),
        f"| | {' | '.join(TIERS[tier] for tier in tiers)} | all |",
        "|---|" + "---:|" * (len(tiers) + 1),
    ]
    for use in ("decoder", "encoder"):
        counts = Counter(r["outcome"] for r in results if r["use"] == use and not r["variant"])
        cells = " | ".join(str(counts[tier]) for tier in tiers)
        lines.append(f"| {use}s | {cells} | {sum(counts.values())} |")
    for use in ("decoder", "encoder"):
        lines += [
            "",
            f"## {use.capitalize()}s",
            "",
            "| model type | class | works | limits |",
            "|---|---|---|---|",
        ]
        lines += [
            f"| {r['name']} | {r['model']} | {TIERS[r['outcome']]} | {_limits(r)} |"
            for r in sorted(results, key=lambda r: r["name"])
            if r["use"] == use
        ]
    return "\n".join(lines) + "\n"


def _limits(result: dict[str, Any]) -> str:
    """What a model cannot do in its tier, or why it is in none, in a few words."""
    if result["outcome"] == "rows":
        every = any("attention computes every token" in note for note in result["notes"])
        return "attentions compute every token" if every else ""
    if result["outcome"] == "sublayers":
        found = [note.split()[:4] for note in result["notes"] if note.partition(":")[0] in _DROPPED]
        fewer = [f"{kind.strip(':')} in {can} of {of} layers" for kind, can, _, of in found if can != of]
        return f"can be dropped: {', '.join(fewer)}" if fewer else ""
    text = result["detail"].partition(" [")[0].removeprefix("UnsupportedModelError: ")
    return text.partition(". ")[0].replace("|", "/")[:160]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m sweep.table", description=__doc__)
    parser.add_argument("results", type=Path, help="the JSON file of a sweep")
    parser.add_argument("page", type=Path, nargs="?", help="where to write; printed where none is named")
    chosen = parser.parse_args()
    page = markdown(json.loads(chosen.results.read_text()))
    if chosen.page is None:
        print(page, end="")
    else:
        chosen.page.parent.mkdir(exist_ok=True)
        chosen.page.write_text(page)


if __name__ == "__main__":
    main()
