"""Prompts as a model gets them: in its chat template if it has one, else as they are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from slimformer.errors import DataError
from slimformer.evaluation.perplexity import evaluating

_AT_ONCE = {"cuda": 64, "cpu": 16}


def prompt_ids(tokenizer: PreTrainedTokenizerBase, prompt: str, chat: bool | None) -> list[int]:
    """Token ids of one prompt.

    Args:
        tokenizer: The model's.
        prompt: What the user says.
        chat: Whether the chat template is used; None where there is one.

    Raises:
        DataError: If there is no template though one is asked for, it fails, or the prompt gives no token.
    """
    template = getattr(tokenizer, "chat_template", None)
    if chat and template is None:
        raise DataError(
            "chat=True wraps prompts in the tokenizer's chat template, and it has none. Leave chat out, or set "
            "tokenizer.chat_template."
        )
    if template is None or chat is False:
        ids = tokenizer(prompt, truncation=False, verbose=False)["input_ids"]
    else:
        message = [{"role": "user", "content": prompt}]
        try:
            ids = tokenizer.apply_chat_template(
                message, add_generation_prompt=True, tokenize=True, return_dict=True
            )["input_ids"]
        # A template can fail in any way that a program can.
        except Exception as error:
            words = " ".join(str(error).split())
            raise DataError(
                f"The tokenizer's chat template fails on a message of the user ({type(error).__name__}: {words}). "
                "Mend tokenizer.chat_template, or give chat=False for prompts as they are."
            ) from error
    if len(ids) == 0:
        raise DataError(f"The prompt {prompt[:80]!r} gives no token. Give prompts with text.")
    return [int(token) for token in ids]


def continued(model: PreTrainedModel, prompts: Sequence[list[int]], new_tokens: int) -> list[list[int]]:
    """What a model writes behind each prompt, greedily: token ids up to and with the one that ends it.

    Args:
        model: A decoder with a language-model head, patched or not.
        prompts: Token ids.
        new_tokens: Most tokens written to each.
    """
    ends = _ends(model)
    order = sorted(range(len(prompts)), key=lambda index: -len(prompts[index]))
    written: list[list[int]] = [[] for _ in prompts]
    size = _AT_ONCE.get(model.device.type, 16)
    for start in range(0, len(order), size):
        batch = order[start : start + size]
        longest = len(prompts[batch[0]])
        missing = [longest - len(prompts[index]) for index in batch]
        ids = [[0] * gap + prompts[index] for gap, index in zip(missing, batch, strict=True)]
        mask = [[0] * gap + [1] * (longest - gap) for gap in missing]
        with evaluating(model):
            found = model.generate(
                torch.tensor(ids, device=model.device),
                attention_mask=torch.tensor(mask, device=model.device),
                max_new_tokens=new_tokens,
                do_sample=False,
                # Of no use without sampling, and warned about.
                temperature=None,
                top_p=None,
                top_k=None,
                pad_token_id=ends[0] if ends else 0,
            )
        for index, row in zip(batch, found[:, longest:].tolist(), strict=True):
            stop = next((place for place, token in enumerate(row) if token in ends), len(row) - 1)
            written[index] = row[: stop + 1]
    return written


def _ends(model: PreTrainedModel) -> list[int]:
    config: Any = model.generation_config
    found = config.eos_token_id if config is not None else None
    return [] if found is None else [found] if isinstance(found, int) else list(found)
