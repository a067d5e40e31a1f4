"""What several commands do with a loaded model."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TextStreamer

from slimformer.cli.output import working
from slimformer.errors import CalibrationError, DataError, PlanError
from slimformer.evaluation.quality import measure_quality
from slimformer.evaluation.readable import longest, predicts_tokens
from slimformer.model.anatomy import find_anatomy
from slimformer.plans.plan import FILE, Plan
from slimformer.text.held_out import split_texts
from slimformer.text.sources import characters_for, load_texts, token_batches_padded, token_blocks

_logger = logging.getLogger("slimformer")
_ROWS_AT_ONCE = 16


def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    plan: Plan,
    *,
    data: str | None,
    text_field: str,
    blocks: int | None,
    sequence_length: int,
    seed: int,
) -> tuple[dict[str, Any], str]:
    """Measure quality on text that the plan was not calibrated on.

    Where the source is the plan's own, only the part that calibration leaves alone is read.

    Returns:
        The figures, and where the text came from.

    Raises:
        DataError: If the source gives too little text.
    """
    anatomy = find_anatomy(model)
    length = min(sequence_length, longest(anatomy, tokenizer))
    count = blocks or (16 if predicts_tokens(model, anatomy) else 64)
    texts, source = unread_texts(plan, data, text_field, count * length)
    with working("measuring quality"):
        if predicts_tokens(model, anatomy):
            ids = token_blocks(texts, tokenizer, sequence_length=length, count=count, seed=seed)
            return measure_quality(model, plan, blocks=ids).to_dict(), source
        rows = token_batches_padded(texts, tokenizer, max_length=length, count=count, seed=seed)
        parts = zip(*(tensor.split(_ROWS_AT_ONCE) for tensor in rows.values()), strict=True)
        batches = [dict(zip(rows, part, strict=True)) for part in parts]
        return measure_quality(model, plan, batches=batches).to_dict(), source


def unread_texts(plan: Plan, data: str | None, text_field: str, tokens: int) -> tuple[list[str], str]:
    """Text that a plan was not chosen by: of its own source only the part that calibration leaves alone.

    Args:
        plan: The plan, whose provenance tells its source.
        data: Where the text is.
        text_field: In which field.
        tokens: How many are wanted.

    Returns:
        The texts, and where they came from.

    Raises:
        DataError: If the source cannot be read, or nothing of it is left.
    """
    # Of the plan's own source, a fifth is read.
    texts, source = load_texts(data, text_field=text_field, enough=characters_for(5 * tokens))
    read = (plan.provenance, _mapping(plan.provenance.get("repaired_with")))
    same = [part for part in read if _name(source) in map(_name, str(part.get("data", "")).split("; "))]
    if same:
        if any(_mapping(part.get("arguments")).get("hold_out") is False for part in same):
            _logger.warning(
                "The plan was chosen by all of this text, so its quality is overestimated: measure on other text."
            )
        else:
            texts, source = split_texts(texts)[1], f"the held-out part of {source}"
        if not texts:
            raise DataError(f"There is no text in {source}. Give other text to --data.")
    return texts, source


def generate_text(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    chat: bool = True,
    stream: bool = False,
) -> str:
    """Continue a prompt; with `stream` the text is printed to standard output as it comes.

    Raises:
        CalibrationError: If the model cannot generate.
        DataError: If the prompt gives no token.
    """
    if not predicts_tokens(model, find_anatomy(model)):
        raise CalibrationError(
            f"{type(model).__name__} makes embeddings and cannot generate text. Give a decoder with a language-model "
            "head."
        )
    if chat and tokenizer.chat_template is not None:
        inputs = tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}],
            add_generation_prompt=True,
            return_tensors="pt",
            return_dict=True,
        )
    else:
        inputs = tokenizer(prompt, return_tensors="pt")
    if inputs["input_ids"].numel() == 0:
        raise DataError("The prompt gives no token. Give some text.")
    padding = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    drawn = {"do_sample": True, "temperature": temperature} if temperature > 0 else {"do_sample": False}
    with torch.no_grad():
        ids = model.generate(
            inputs["input_ids"].to(model.device),
            attention_mask=inputs["attention_mask"].to(model.device),
            max_new_tokens=max_new_tokens,
            pad_token_id=padding,
            streamer=TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True) if stream else None,
            **drawn,
        )
    return tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def plan_folder(path: str) -> Path:
    """The folder in which figures can be kept with a plan.

    Raises:
        PlanError: If the plan is not in a folder of this machine.
    """
    given = Path(path)
    if given.is_dir():
        return given
    if given.is_file() and given.name == FILE:
        return given.parent
    raise PlanError(
        f"--save keeps the figures beside the plan, and {path} is not a plan's folder on this machine."
    )


def keep(folder: Path, plan: Plan, measured: Mapping[str, Any]) -> Plan:
    """Write the figures into the plan, beside those it has."""
    whole = dataclasses.replace(plan, measured={**plan.measured, **measured})
    whole.save_pretrained(folder)
    return whole


def _name(source: str) -> str:
    # load_texts ends its line in the number of texts and a checksum.
    return source.rsplit(", ", 2)[0]


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}
