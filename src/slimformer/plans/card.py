"""A plan's model card: what it leaves out, what was measured, and how to use it.

The part between two marks is written anew with the plan. Text around it is the user's, and so is the part itself once
somebody has edited it, which a checksum in the first mark tells.
"""

from __future__ import annotations

import hashlib
import math
import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from huggingface_hub import ModelCard, ModelCardData

from slimformer.decisions.registry import name_of, settings_of
from slimformer.errors import SlimformerWarning
from slimformer.methods.early_exit import EarlyExit
from slimformer.methods.layer_drop import LayerDrop
from slimformer.methods.weight_delta import WeightDelta
from slimformer.plans.base_model import INHERITED
from slimformer.transforms.transform import AttentionTransform

if TYPE_CHECKING:
    from slimformer.plans.plan import Plan

_BEGIN, _END = "<!-- slimformer: begin, sha256 {} -->", "<!-- slimformer: end -->"
_MARKED = re.compile(
    r"<!-- slimformer: begin, sha256 ([0-9a-f]{16}) -->\n(.*?)\n<!-- slimformer: end -->", re.S
)
# What is decided once, so that other engines can hold it.
_ONCE = (LayerDrop, EarlyExit, WeightDelta)
_LONGEST = 200


def plan_card(plan: Plan, name: str) -> tuple[dict[str, Any], str]:
    """The metadata and the text of a plan's card.

    Args:
        plan: The plan.
        name: What it is called: its repository, or its folder.
    """
    base = base_of(plan)
    metadata = {"library_name": "slimformer", **card_base(base), "tags": ["slimformer", *_tags(plan)]}
    of = base.get("id") or base.get("name") or plan.fingerprint.get("model_type") or "a transformers model"
    parts = [
        f"# {_cell(name)}",
        f"A plan for {_cell(of)}: what slimformer leaves out of it so that it runs cheaper. `pip install slimformer`",
        *figures_of(plan),
        *_use(plan, name, str(base.get("id") or base.get("name") or "my-model")),
    ]
    return metadata, "\n\n".join(parts)


def figures_of(plan: Plan) -> list[str]:
    """Sections for what a plan drops, what it keeps, how fast it is and how it was chosen."""
    return [*_dropped(plan), *_kept(plan.measured), *_speed(plan.measured), *_chosen(plan)]


def base_of(plan: Plan) -> Mapping[str, Any]:
    """What a plan says of the model it was made for."""
    repaired = _mapping(plan.provenance.get("repaired_with"))
    return _mapping(plan.provenance.get("base_model") or repaired.get("base_model"))


def card_base(base: Mapping[str, Any]) -> dict[str, Any]:
    """Metadata for what is made of a model."""
    metadata = {"base_model": base.get("id"), "pipeline_tag": base.get("pipeline_tag")}
    metadata |= {name: base.get(name) for name in INHERITED}
    return {name: value for name, value in metadata.items() if isinstance(value, (str, list)) and value}


def plan_name(model: str, plan: Plan) -> str:
    """What a plan is called by convention: the model, and how many sublayers of a kind are gone.

    Args:
        model: A Hub id, or what the model is called.
        plan: The plan.

    Example:
        >>> from slimformer import LayerDrop, Plan
        >>> plan_name("HuggingFaceTB/SmolLM2-135M", Plan([LayerDrop(attention=[3, 5, 7], block=[9])]))
        'SmolLM2-135M-slim-block1-attn3'
    """
    gone = {kind: set(plan.dropped(kind)) for kind in ("attention", "mlp")}
    blocks = gone["attention"] & gone["mlp"]
    numbers = (("block", blocks), ("attn", gone["attention"] - blocks), ("mlp", gone["mlp"] - blocks))
    parts = [f"{kind}{len(layers)}" for kind, layers in numbers if layers]
    others = (m for m in plan.methods if not isinstance(m, _ONCE))
    parts += dict.fromkeys(_kebab(name_of(m) or type(m).__name__) for m in others)
    return "-".join([model.rpartition("/")[2], "slim", *(parts or ["plan"])])


def written_card(file: Path, metadata: Mapping[str, Any], text: str) -> str | None:
    """The content of a card, with what the user wrote into an earlier one.

    Args:
        file: The earlier card, which need not exist. What its metadata says stays; tags are put together.
        metadata: What is known anew.
        text: The part that is written anew.

    Returns:
        None where the earlier card is the user's own and stays as it is; a warning says so.
    """
    part = f"{_BEGIN.format(_digest(text))}\n{text}\n{_END}"
    if not file.is_file():
        return _assembled(metadata, part)
    try:
        earlier = file.read_text(encoding="utf-8")
        known = ModelCard(earlier, ignore_metadata_errors=True) if earlier[:3] == "---" else None
    except (OSError, ValueError, TypeError, yaml.YAMLError):
        earlier, known = "", None
    marked = _MARKED.search(earlier)
    if marked is None or marked[1] != _digest(marked[2]):
        what = (
            "is not one that slimformer wrote" if marked is None else "was edited between slimformer's marks"
        )
        warnings.warn(
            f"The card {file} {what}, so that it stays as it is. Move it away to have one written.",
            SlimformerWarning,
            stacklevel=3,
        )
        return None
    said = {} if known is None else known.data.to_dict()
    tags = dict.fromkeys([*_listed(said.get("tags")), *_listed(metadata.get("tags"))])
    body = earlier if known is None else known.text
    return _assembled(
        {**metadata, **said, "tags": list(tags)}, _MARKED.sub(lambda _: part, body, count=1).strip()
    )


def card_part(content: str) -> str | None:
    """What slimformer wrote into a card; None where it wrote nothing.

    Example:
        >>> card_part("# A model of somebody's") is None
        True
    """
    marked = _MARKED.search(content)
    return None if marked is None else marked[2]


def commands(lines: Iterable[str], language: str = "sh") -> str:
    """Lines of code as a block of Markdown."""
    return "\n".join([f"```{language}", *lines, "```"])


def rows(head: Sequence[str], content: Iterable[Sequence[str]]) -> str:
    """A table of Markdown."""
    ruled = ["| " + " | ".join(head) + " |", "|" + " :-- |" + " --: |" * (len(head) - 1)]
    return "\n".join([*ruled, *("| " + " | ".join(map(_cell, row)) + " |" for row in content)])


def _assembled(metadata: Mapping[str, Any], body: str) -> str:
    return f"---\n{ModelCardData(**metadata, ignore_metadata_errors=True).to_yaml()}\n---\n\n{body}\n"


def _dropped(plan: Plan) -> list[str]:
    gone = {kind: set(plan.dropped(kind)) for kind in ("attention", "mlp")}
    blocks = gone["attention"] & gone["mlp"]
    parts = (
        ("whole layers", blocks),
        ("attentions", gone["attention"] - blocks),
        ("MLPs", gone["mlp"] - blocks),
    )
    lines = [
        f"- {len(layers)} {name}: {', '.join(map(str, sorted(layers)))}" for name, layers in parts if layers
    ]
    left = {method.replace for method in plan.drops} - {"nothing"}
    lines += [f"- in their place {' or '.join(sorted(left))}"] * bool(left)
    count = plan.fingerprint.get("layers")
    lines += [f"- of {count} layers"] * (isinstance(count, int) and bool(lines))
    for method in plan.methods:
        if isinstance(method, WeightDelta):
            lines.append(
                "- repaired: what training changed in the weights that are left is merged when it is applied"
            )
        elif not isinstance(method, LayerDrop):
            said = ", ".join(f"{key} {_cell(value)}" for key, value in settings_of(method).items())
            lines.append(f"- {type(method).__name__}: {said}")
    return ["## What it leaves out", "\n".join(lines)]


def _kept(measured: Mapping[str, Any]) -> list[str]:
    panel, quality = _mapping(measured.get("panel")), _mapping(measured.get("quality"))
    found = []
    table = [
        (name, f"{100 * kept:.1f}%", "" if spread is None else f"{100 * spread:.1f}")
        for name, entry in _mapping(panel.get("capabilities")).items()
        if (kept := _number(_mapping(entry).get("kept"))) is not None
        for spread in [_number(_mapping(entry).get("spread"))]
    ]
    score, spread = _number(panel.get("score")), _number(panel.get("spread"))
    if table:
        if score is not None:
            last = "" if spread is None else f"{100 * spread:.1f}"
            table.append(("score: mean and worst", f"{100 * score:.1f}%", last))
        found.append(rows(("capability", "kept of dense's", "± standard error"), table))
    lines = [
        (name, form.format(value))
        for name, key, form in (
            ("perplexity, dense", "perplexity_dense", "{:.2f}"),
            ("perplexity, slim", "perplexity_slim", "{:.2f}"),
            ("KL to dense, nats per token", "divergence", "{:.4f}"),
            ("same next token as dense", "agreement", "{:.1%}"),
            ("cosine to the dense embedding", "embedding_cosine", "{:.4f}"),
        )
        if (value := _number(quality.get(key))) is not None
    ]
    if lines:
        found.append(rows((f"on {_cell(quality.get('data', 'text'))}", ""), lines))
    for name in ("task", "tasks"):
        task = _mapping(measured.get(name))
        dense, slim = _mapping(task.get("dense")), _mapping(task.get("slim"))
        errors = _mapping(task.get("standard_error"))
        pairs = [
            (key, f"{before:.4g}", f"{after:.4g}", "" if error is None else f"{error:.2g}")
            for key, value in slim.items()
            if (after := _number(value)) is not None and (before := _number(dense.get(key))) is not None
            for error in [_number(errors.get(key))]
        ]
        if pairs:
            found.append(rows(("task", "dense", "slim", "± standard error"), pairs))
    repair = _mapping(measured.get("repair"))
    before, after = (_number(repair.get(f"divergence_{when}")) for when in ("before", "after"))
    if before is not None and after is not None:
        found.append(f"Repair brought the divergence from dense from {before:.4g} to {after:.4g}.")
    return ["## What it keeps", *found] if found else []


def _speed(measured: Mapping[str, Any]) -> list[str]:
    speed = _mapping(measured.get("speed"))
    dense, slim = _mapping(speed.get("dense")), _mapping(speed.get("slim"))
    table = []
    for name, key, spread in (
        ("prompt, ms", "prefill_seconds", "prefill"),
        ("next token, ms", "decode_seconds_per_token", "decode"),
    ):
        pair = [_number(of.get(key)) for of in (dense, slim)]
        if all(pair):
            cells = [
                f"{1000 * float(value or 0):.3g} ({_between(of, spread)})"
                for value, of in zip(pair, (dense, slim), strict=True)
            ]
            table.append((name, *cells, f"{float(pair[0] or 0) / float(pair[1] or 1):.2f}×"))
    if not table:
        return []
    sizes = [
        f"{speed[k]} {w}"
        for k, w in (("prompt_tokens", "tokens"), ("batch_size", "texts at once"))
        if k in speed
    ]
    where = ", ".join([_cell(speed.get("device", "an unknown device")), *map(_cell, sizes)])
    head = ("median (20th to 80th percentile)", "dense", "slim", "as fast")
    return ["## How fast it is", f"On {where}.", rows(head, table)]


def _between(of: Mapping[str, Any], name: str) -> str:
    ends = [_number(of.get(f"{name}_{end}")) for end in ("p20", "p80")]
    return " to ".join("?" if end is None else f"{1000 * end:.3g}" for end in ends)


def _chosen(plan: Plan) -> list[str]:
    provenance, base = plan.provenance, base_of(plan)
    repaired = _mapping(provenance.get("repaired_with"))
    facts = (
        ("base model", base.get("id") or base.get("name")),
        ("its revision", base.get("revision")),
        ("its licence", base.get("license")),
        ("chosen by", provenance.get("data")),
        ("tokens read", provenance.get("tokens")),
        ("repaired on", repaired.get("data")),
        ("tokens trained on", repaired.get("tokens")),
        ("versions", ", ".join(f"{k} {v}" for k, v in _mapping(provenance.get("versions")).items())),
        ("device", provenance.get("device")),
    )
    lines = [f"- {name}: {_cell(value)}" for name, value in facts if value]
    return ["## How it was chosen", "\n".join(lines)] if lines else []


def _use(plan: Plan, name: str, model: str) -> list[str]:
    causal = base_of(plan).get("pipeline_tag") == "text-generation"
    auto = "AutoModelForCausalLM" if causal else "AutoModel"
    python = [
        "import slimformer",
        f"from transformers import {auto}",
        "",
        f'model = {auto}.from_pretrained("{_cell(model)}")',
        f'slimformer.patch(model, "{_cell(name)}")',
    ]
    found = ["## Use", "In transformers:", commands(python, "python")]
    if not all(isinstance(method, _ONCE) for method in plan.methods):
        return [*found, "It decides while the model runs, which other engines cannot."]
    gone = [set(plan.dropped(kind)) for kind in ("attention", "mlp")]
    blocks = gone[0] == gone[1] and all(method.replace == "nothing" for method in plan.drops)
    export = f"slimformer export {_cell(model)} --plan {_cell(name)} -o slim --to"
    lines = [f"{export} checkpoint  # whatever loads the whole model"] * blocks
    if causal:
        lines += [f"{export} vllm  # then: vllm serve slim", f"{export} gguf  # for llama.cpp"]
    elif blocks:
        lines.append(f"{export} onnx --quantize int8  # for ONNX Runtime and OpenVINO")
    return [*found, "In other engines:", commands(lines)] if lines else found


def _tags(plan: Plan) -> list[str]:
    names = (name_of(method) or type(method).__name__ for method in plan.methods)
    transforms = any(isinstance(method, AttentionTransform) for method in plan.methods)
    pruned = bool(plan.dropped("attention") or plan.dropped("mlp"))
    return [
        *dict.fromkeys(map(_kebab, names)),
        *["pruned"] * pruned,
        *["attention-transform"] * transforms,
    ]


def _kebab(name: str) -> str:
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])|_", "-", name).lower()


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _listed(value: Any) -> list[str]:
    return [value] if isinstance(value, str) else [str(entry) for entry in value or []]


def _number(value: Any) -> float | None:
    known = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    return float(value) if known else None


def _cell(value: Any) -> str:
    """A value that may come from anywhere, as text that neither a table nor HTML nor code takes for its own."""
    text = " ".join(str(value).split())
    text = re.sub(r"[|`<>\"\\]", " ", text)
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}…"
