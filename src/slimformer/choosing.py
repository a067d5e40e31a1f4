"""`slimformer.calibrate`: one way to choose or train any method from data."""

from __future__ import annotations

import inspect
import os
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeAlias

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from slimformer.calibration.drafts.draft import choose_draft
from slimformer.calibration.drops.drop import choose_drops
from slimformer.calibration.elastic import choose_exit
from slimformer.calibration.elimination import choose_elimination
from slimformer.calibration.narrow_mlps import choose_narrow
from slimformer.calibration.temperature import choose_temperature
from slimformer.decisions.registry import field_names
from slimformer.errors import CalibrationError
from slimformer.evaluation.embedding_tasks import EmbeddingTask
from slimformer.evaluation.length_spread import LengthSpread
from slimformer.methods.early_exit import EarlyExit
from slimformer.methods.elimination.token_elimination import TokenElimination
from slimformer.methods.layer_drop import LayerDrop
from slimformer.methods.mixture_of_depths import MixtureOfDepths
from slimformer.methods.narrow_mlp import NarrowMlp
from slimformer.methods.speculation.self_speculation import SelfSpeculation
from slimformer.methods.temperature import TempScale
from slimformer.plans.plan import Plan
from slimformer.training.predictors import learn_predictors
from slimformer.training.routing.routers import learn_routing

Data: TypeAlias = (
    EmbeddingTask
    | LengthSpread
    | str
    | os.PathLike[str]
    | Iterable[str]
    | Sequence[Mapping[str, Tensor]]
    | None
)
# What chooses each method: its keyword-only parameters are the options of `calibrate`.
_CHOSEN_BY: dict[type[Any], Callable[..., Plan]] = {
    LayerDrop: choose_drops,
    SelfSpeculation: choose_draft,
    NarrowMlp: choose_narrow,
    EarlyExit: choose_exit,
    TokenElimination: choose_elimination,
    TempScale: choose_temperature,
    MixtureOfDepths: learn_routing,
}
# The names that `calibrate` had for options before it took a method.
_OLD = {"max_divergence": "max_loss", "objective": "task"}


def calibrate(
    model: Any,
    tokenizer: PreTrainedTokenizerBase | None = None,
    method: object = None,
    *,
    data: Data = None,
    **options: Any,
) -> Plan:
    """Choose what a model need not compute, from your own text, and make the plan of it.

    What a method *is* stands in its fields: give an instance to fix some of them. How it is *chosen* stands in options,
    which are the same for all methods where they mean the same: `data`, `text_field`, `hold_out` (leave a part of the
    data for `slimformer eval`), `max_loss`, `length` (tokens of a text), `layers` (candidates), `kinds`, `seed`,
    `checkpoint` (a folder for partial results, from which the same call resumes) and `progress`.

    | method | fields to fix | options of its own |
    | --- | --- | --- |
    | `LayerDrop` | `replace`, `taps` | `drop`, `max_loss`, `speedup`, `kinds`, `selection`, `task`, `budget` |
    | `SelfSpeculation`: the plan of its draft | | `kinds`, `prompts`, `new_tokens`, `drop` |
    | `NarrowMlp` | | `keep` or `max_loss`, `fit_on`, `batch_size` |
    | `EarlyExit` | `layer`, or `max_loss` | `layers`, `dimensions`, `head`, `fit_on`, `batch_size` |
    | `TokenElimination` | all but `schedule` | `max_loss`, `length`, `answer`, `texts`, `recall`, `layers`, `keep` |
    | the same with `scorer="predictor"`: trained | the same | `schedule`, `length`, `size`, `rank`, `settings` |
    | `TempScale` | | `temperatures`, `batch_size` |
    | `MixtureOfDepths`: trained | `keep`, `routing`, `shared`, `per`, `tokens`, `keep_kv`; or the layers | `number`, \
`kinds`, `metric`, `texts`, `length`, `train`, `settings` |

    Args:
        model: An unpatched model; it is left as it was. `EarlyExit`, `NarrowMlp` and `TempScale` take a
            SentenceTransformer.
        tokenizer: Its tokenizer; None for a SentenceTransformer or Pipeline, which bring their own.
        method: The class of a method, or one that fixes some of its fields, such as `TokenElimination(scorer="norm")`.
        data: What is read. Text: a `.txt`, `.jsonl` or `.parquet` file, a Hub dataset id, `"-"` for standard input, a
            list of strings, or None for a text that every Python carries. For a SentenceTransformer also a folder in
            BEIR's layout or a `.tsv` file of scored pairs, by whose figure it is then chosen. Data like that of your
            own application are better.
        options: As the table says; the docstring of `slimformer.choosing.chosen_by(method)` has all of them.

    Returns:
        The plan, with what it was chosen by in `plan.provenance`.

    Raises:
        CalibrationError: If the method or an option is not one of those allowed, the model is patched, or a goal cannot
            be reached.
        DataError: If the data cannot be read or are too short.
        UnsupportedModelError: If the model's structure is not known.

    Example:
        >>> import slimformer
        >>> from slimformer import LayerDrop
        >>> plan = slimformer.calibrate(model, tokenizer, LayerDrop, data="notes.txt", drop=4)  # doctest: +SKIP
        >>> slimformer.patch(model, plan)  # doctest: +SKIP
    """
    if _names_a_method(tokenizer):
        name = _kind(tokenizer).__name__
        raise CalibrationError(
            f"{name} stands where the tokenizer belongs. Call calibrate(model, tokenizer, {name}, ...), with None for "
            "the tokenizer of a SentenceTransformer or Pipeline."
        )
    if method is None:
        method, options = _as_before(options)
    choose, kind = chosen_by(method), _kind(method)
    _check_options(kind, choose, options)
    arguments: dict[str, Any] = {"data": data, **options}
    takes = inspect.signature(choose).parameters
    if "method" in takes and not isinstance(method, type):
        arguments["method"] = method
    if "tokenizer" in takes:
        return choose(model, tokenizer, **arguments)
    if tokenizer is not None and tokenizer is not getattr(model, "tokenizer", None):
        raise CalibrationError(
            f"{kind.__name__} is chosen by a SentenceTransformer's embeddings, with its own tokenizer. Give None "
            "for it."
        )
    return choose(model, **arguments)


def options_of(method: object) -> tuple[str, ...]:
    """The options that `calibrate` takes for a method.

    Args:
        method: As `calibrate` takes it.

    Raises:
        CalibrationError: If it is none that can be calibrated.

    Example:
        >>> options_of(TempScale)
        ('data', 'text_field', 'temperatures', 'hold_out', 'batch_size', 'progress')
    """
    parameters = inspect.signature(chosen_by(method)).parameters.values()
    return tuple(p.name for p in parameters if p.kind is p.KEYWORD_ONLY)


def chosen_by(method: object) -> Callable[..., Plan]:
    """The function that chooses a method: its keyword-only parameters are the options, and its docstring says more.

    Raises:
        CalibrationError: If the method cannot be calibrated, or leaves nothing to choose.

    Example:
        >>> chosen_by(LayerDrop).__name__
        'choose_drops'
    """
    if isinstance(method, TokenElimination) and method.scorer == "predictor":
        return learn_predictors
    kind = _kind(method)
    if not isinstance(method, type) and "method" not in inspect.signature(_CHOSEN_BY[kind]).parameters:
        raise CalibrationError(
            f"{method!r} leaves nothing to choose: patch it as it is, or give the class {kind.__name__}."
        )
    return _CHOSEN_BY[kind]


def _as_before(options: Mapping[str, Any]) -> tuple[LayerDrop, dict[str, Any]]:
    """What a call without a method meant: a `LayerDrop`, its fields among the options."""
    warnings.warn(
        "calibrate without a method is deprecated. Say what is chosen: slimformer.calibrate(model, tokenizer, "
        "LayerDrop, ...), with max_loss for max_divergence, task for objective, and LayerDrop(replace=..., taps=...).",
        DeprecationWarning,
        stacklevel=3,
    )
    renamed = {_OLD.get(name, name): value for name, value in options.items()}
    replace, taps = renamed.pop("replace", "nothing"), renamed.pop("taps", 4)
    return LayerDrop(replace=replace, taps=taps), renamed


def _names_a_method(given: object) -> bool:
    return (given if isinstance(given, type) else type(given)) in _CHOSEN_BY


def _kind(method: object) -> type[Any]:
    kind = method if isinstance(method, type) else type(method)
    if kind not in _CHOSEN_BY:
        raise CalibrationError(
            f"calibrate takes one of {', '.join(known.__name__ for known in _CHOSEN_BY)}, or one of these with some "
            f"fields fixed; got {method!r}. Other methods are patched as they are."
        )
    return kind


def _check_options(kind: type[Any], choose: Callable[..., Plan], options: Mapping[str, Any]) -> None:
    parameters = inspect.signature(choose).parameters.values()
    allowed = {p.name: p for p in parameters if p.kind is p.KEYWORD_ONLY}
    absent = [name for name, p in allowed.items() if p.default is p.empty and name not in options]
    if absent:
        raise CalibrationError(
            f"{kind.__name__} needs {', '.join(f'{name}=...' for name in absent)} as well."
        )
    for name in options:
        if name in allowed:
            continue
        if name in field_names(kind):
            raise CalibrationError(
                f"{name} is a field of the method: give {kind.__name__}({name}=...) instead of {kind.__name__}."
            )
        raise CalibrationError(
            f"{name} does not apply to {kind.__name__}. Its options are {', '.join(allowed)}."
        )
