"""lm-evaluation-harness (EleutherAI) on a model as it is, patched or not, through its own Python API."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from slimformer.errors import DataError

_LONGEST_REASON = 400


class TaskScores(NamedTuple):
    """What the harness says.

    Attributes:
        values: Every metric of every task, such as `"hellaswag acc_norm"`.
        errors: Standard errors of those that have one.
    """

    values: dict[str, float]
    errors: dict[str, float]


def lm_eval_scores(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[str | Mapping[str, Any]],
    *,
    limit: int | None = None,
    batch_size: int = 8,
    **options: Any,
) -> TaskScores:
    """Run tasks of the harness.

    Args:
        model: A decoder with a language-model head, patched or not.
        tokenizer: Its tokenizer.
        tasks: Names that the harness knows, or task configurations as it takes them.
        limit: Questions per task; left out, all of them.
        batch_size: Questions per forward.
        options: For `lm_eval.simple_evaluate`, such as `num_fewshot` or `apply_chat_template`.

    Raises:
        DataError: If the harness is not installed, knows no such task, or cannot get at its data.

    Example:
        >>> with slimformer.patched(model, plan):  # doctest: +SKIP
        ...     lm_eval_scores(model, tokenizer, ["hellaswag"], limit=200).values
        {'hellaswag acc': 0.41, 'hellaswag acc_norm': 0.55}
    """
    asked = [task if isinstance(task, str) else dict(task) for task in tasks]
    if not asked or any(isinstance(task, str) and not task.strip() for task in asked):
        raise DataError(f"Expected names of tasks, such as hellaswag, got {list(tasks)!r}.")
    try:
        harness: Any = importlib.import_module("lm_eval")
        wrapper: Any = importlib.import_module("lm_eval.models.huggingface").HFLM
    except ImportError as error:
        raise DataError(
            'Tasks are run by lm-evaluation-harness, which is not installed: pip install "slimformer[eval]"'
        ) from error
    try:
        wrapped = wrapper(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
        found = harness.simple_evaluate(model=wrapped, tasks=asked, limit=limit, log_samples=False, **options)
    # Its own errors and those of the libraries that fetch data share no base class.
    except Exception as error:
        named = ", ".join(str(task) if isinstance(task, str) else str(task.get("task")) for task in asked)
        raise DataError(
            f"lm-evaluation-harness cannot run {named}: {reason(error)}. lm_eval ls tasks prints what it knows; "
            "the data of a task come from the Hub, or from the folder that HF_HOME names."
        ) from error
    values: dict[str, float] = {}
    errors: dict[str, float] = {}
    for task, metrics in found["results"].items():
        for key, value in metrics.items():
            # As "acc_norm,none" and "acc_norm_stderr,none": metric and filter.
            metric, _, kind = key.partition(",")
            if not isinstance(value, (int, float)) or isinstance(value, bool) or not kind:
                continue
            known = metric.removesuffix("_stderr")
            name = f"{task} {known}" + (f" ({kind})" if kind != "none" else "")
            (errors if metric.endswith("_stderr") else values)[name] = float(value)
    return TaskScores(values, errors)


def reason(error: Exception) -> str:
    """What an error of another library says, in one line.

    Example:
        >>> reason(ValueError("no such\\n task."))
        'ValueError: no such task'
    """
    words = " ".join(str(error).split()).rstrip(".")
    shown = words if len(words) <= _LONGEST_REASON else words[:_LONGEST_REASON] + "..."
    return f"{type(error).__name__}: {shown}" if shown else type(error).__name__
