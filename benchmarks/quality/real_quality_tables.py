"""Tables of what a real model's plans keep, beside what perplexity and the panel say of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarks.frame import tables
from benchmarks.frame.inputs import DENSE
from benchmarks.frame.registry import table
from benchmarks.quality.real_quality_cases import CASES, Case
from benchmarks.quality.real_quality_elimination import ELIMINATIONS
from benchmarks.quality.real_quality_figures import TASKS

_SOURCE = "real_quality"
Values = Mapping[str, float]
Cell = Callable[[Values], str]
_CAPABILITIES = {
    "text": "text",
    "own_words": "own words",
    "copying": "copying",
    "retrieval": "retrieval",
    "reasoning": "reasoning",
}
_FIGURES = {
    "panel": "panel's score",
    "panel_own_words": "own words",
    "panel_worst": "the panel's worst",
    "panel_text": "text",
    "perplexity": "perplexity, the lower the better",
}
_ELIMINATED = {
    "elimination-dense": "dense",
    "elimination-last-half": "dense, the last half of the document",
    "elimination-60": "attention",
    "elimination-60-max": "attention, max over heads",
    "elimination-half": "attention, max over heads",
    "elimination-46": "attention",
    "elimination-chosen": "attention, max over heads; schedule chosen",
    "elimination-chosen-predictor": "predictor; schedule chosen",
    "elimination-half-predictor": "predictor",
}


def _values(content: dict[str, Any], part: str) -> dict[str, float]:
    """Everything that was measured of a part; empty where nothing was."""
    found: dict[str, float] = {}
    for measurement in content["measurements"]:
        if measurement["candidate"] == part and measurement["status"] == "ok":
            found |= {name: value for name, value in measurement["values"].items() if value is not None}
    return found


def _measured(content: dict[str, Any]) -> dict[str, dict[str, float]]:
    """The plans whose tasks were all asked, with the times of what was chosen."""
    found = {
        key: _values(content, f"speed-{case.as_chosen().key}") | _values(content, key)
        for key, case in CASES.items()
    }
    return {key: values for key, values in found.items() if "mean" in values}


def _percent(name: str) -> Cell:
    return lambda values: tables.shown(None if name not in values else 100 * values[name], ".1f")


def _with_spread(name: str) -> Cell:
    def cell(values: Values) -> str:
        if name not in values:
            return "–"
        spread = values.get(f"{name}_spread")
        return f"{100 * values[name]:.1f}" + ("" if spread is None else f" ± {100 * spread:.1f}")

    return cell


def _plain(name: str, form: str, unit: str = "") -> Cell:
    return lambda values: tables.shown(values.get(name), form, unit)


def _by_plan(content: dict[str, Any], columns: Mapping[str, Cell], *, dense: bool) -> str:
    """One row per plan of the first seed."""
    rows = []
    own = _values(content, DENSE)
    if dense and own:
        rows.append([DENSE, *(cell(own) for cell in columns.values())])
    for key, values in _measured(content).items():
        if not CASES[key].seed:
            rows.append([CASES[key].name, *(cell(values) for cell in columns.values())])
    return _filled(["Removed", *columns], rows)


def _filled(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table without the columns in which nothing is; nothing at all where there is no row."""
    known = [place for place in range(len(head)) if any(row[place] != "–" for row in rows)]
    if not rows:
        return ""
    return tables.markdown(
        [head[place] for place in known], [[row[place] for place in known] for row in rows]
    )


@table("real_quality")
def kept_of_tasks(content: dict[str, Any]) -> str:
    """Perplexity and panel beside the tasks, and these as parts of dense's."""
    columns = {
        "perplexity": _plain("perplexity", ".2f"),
        "panel": _with_spread("panel"),
        **{label: _with_spread(name) for name, label in TASKS.items()},
        "mean, of dense": _with_spread("mean_of_dense"),
        "worst, of dense": _with_spread("worst_of_dense"),
    }
    return _by_plan(content, columns, dense=True)


@table("real_quality_panel", source=_SOURCE)
def kept_of_capabilities(content: dict[str, Any]) -> str:
    """Every capability."""
    columns = {label: _with_spread(f"panel_{name}") for name, label in _CAPABILITIES.items()}
    columns |= {"score": _with_spread("panel"), "mean of tasks": _with_spread("mean_of_dense")}
    return _by_plan(content, columns, dense=False)


@table("real_quality_costs", source=_SOURCE)
def saved_and_spent(content: dict[str, Any]) -> str:
    """What a plan saves, and the minutes that it took."""
    columns = {
        "prefill": _plain("prefill_speedup", ".2f", "×"),
        "generate": _plain("generate_speedup", ".2f", "×"),
        "multiplications": _percent("work"),
        "cache": _percent("cache"),
        "weights": _percent("weights"),
        "chosen in, s": _plain("choosing_seconds", ".0f"),
        "repaired in, s": _plain("repair_seconds", ".0f"),
        "mean of tasks": _percent("mean_of_dense"),
    }
    return _by_plan(content, columns, dense=False)


@table("real_quality_seeds", source=_SOURCE)
def over_seeds(content: dict[str, Any]) -> str:
    """Mean and standard deviation over the seeds of a repair."""
    found = _measured(content)
    again = dict.fromkeys(case.name for key, case in CASES.items() if key in found and case.seed)
    columns = ("perplexity", "panel", "mean_of_dense", "worst_of_dense", *TASKS)
    rows = []
    for name in again:
        of = [values for key, values in found.items() if CASES[key].name == name]
        rows.append([name, str(len(of)), *(_over([v.get(column) for v in of], column) for column in columns)])
    head = ["perplexity", "panel", "mean, of dense", "worst, of dense", *TASKS.values()]
    return _filled(["Removed", "seeds", *head], rows)


def _over(values: Sequence[float | None], name: str) -> str:
    known = torch.tensor([value for value in values if value is not None], dtype=torch.float64)
    if not len(known):
        return "–"
    scale, digits = (1, 2) if name == "perplexity" else (100, 1)
    spread = f" ± {scale * float(known.std()):.{digits}f}" if len(known) > 1 else ""
    return f"{scale * float(known.mean()):.{digits}f}{spread}"


@table("real_quality_correlation", source=_SOURCE)
def which_figure_predicts(content: dict[str, Any]) -> str:
    """Rank correlation of every figure with the tasks, over the plans that have it, and the range over resamples."""
    plans = list(_measured(content).values())
    rows = []
    for name, label in _FIGURES.items():
        known = [values for values in plans if name in values and "mean_of_dense" in values]
        cells = [_correlation(known, name, task) for task in ("mean_of_dense", "worst_of_dense", "gsm8k")]
        rows.append([label, str(len(known)), *cells])
    head = ["plans", "mean of tasks", "worst of tasks", "GSM8K"]
    return tables.markdown(["Figure", *head], rows)


def _correlation(plans: Sequence[Values], name: str, task: str) -> str:
    sign = -1.0 if name == "perplexity" else 1.0
    one, other = (torch.tensor([values[of] for values in plans], dtype=torch.float64) for of in (name, task))
    found = spearman(sign * one, other)
    if found is None:
        return "–"
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randint(len(one), (1000, len(one)), generator=generator)
    again = [value for i in drawn if (value := spearman(sign * one[i], other[i])) is not None]
    low, high = (
        torch.tensor(again, dtype=torch.float64).quantile(torch.tensor([0.05, 0.95]).double()).tolist()
    )
    return f"{found:.2f} ({low:.2f} to {high:.2f})"


def spearman(one: Tensor, other: Tensor) -> float | None:
    """The rank correlation of two rows of figures, ties sharing their mean rank; None where all of one are equal.

    Example:
        >>> one = torch.tensor([1.0, 2.0, 2.0, 9.0])
        >>> spearman(one, one.exp()), spearman(one, torch.ones(4))
        (1.0, None)
    """
    if len(one) < 3:
        return None
    ranks = torch.stack([_ranks(one), _ranks(other)])
    if bool((ranks.std(1) == 0).any()):
        return None
    value = float(torch.corrcoef(ranks)[0, 1])
    return None if math.isnan(value) else round(value, 12)


def _ranks(values: Tensor) -> Tensor:
    below, same = (values[:, None] > values).sum(1), (values[:, None] == values).sum(1)
    return below.double() + (same.double() - 1) / 2


@table("real_quality_routing", source=_SOURCE)
def routed_beside_dropped(content: dict[str, Any]) -> str:
    """Half of the tokens past half of the attentions, and as many attentions dropped as that saves."""
    beside = (Case("attention", 14, "routed"), Case("attention", 7, "cosine"), Case("attention", 7, "panel"))
    columns = {
        "multiplications": _percent("work"),
        "prefill": _plain("prefill_speedup", ".2f", "×"),
        "generate": _plain("generate_speedup", ".2f", "×"),
        "cache": _percent("cache"),
        "panel": _with_spread("panel"),
        "perplexity": _plain("perplexity", ".2f"),
        "mean, of dense": _with_spread("mean_of_dense"),
        "worst, of dense": _with_spread("worst_of_dense"),
    }
    found, rows = _measured(content), []
    if beside[0].key not in found:
        return ""
    for case in (*beside, *(Case(of.unit, of.number, of.chosen, repaired=True) for of in beside)):
        if case.key in found:
            rows.append([case.name, *(cell(found[case.key]) for cell in columns.values())])
    return _filled(["Removed", *columns], rows)


@table("real_quality_elimination", source=_SOURCE)
def long_documents(content: dict[str, Any]) -> str:
    """Questions about meetings and keys in long texts, with what is computed and how long it takes."""
    lengths = ("4096", "8192", "16384")
    columns: dict[str, Cell] = {
        "computed": _percent("work"),
        "prefill at 8k": _plain("prefill_speedup", ".2f", "×"),
        "right": _with_spread("right"),
        "of dense": _with_spread("right_of_dense"),
        "certainty, of dense": _percent("certainty_of_dense"),
        "right, 4k to 8k": _percent("right_4k_to_8k"),
        "8k to 16k": _percent("right_8k_to_16k"),
        **{f"keys at {int(n) // 1024}k": _percent(f"retrieval_{n}") for n in lengths},
    }
    rows = []
    for part in ELIMINATIONS:
        values = _values(content, f"speed-{part}") | _values(content, part)
        if "right" in values:
            schedule = next(m["note"] for m in content["measurements"] if m["candidate"] == part)
            rows.append([_ELIMINATED[part], schedule, *(cell(values) for cell in columns.values())])
    return _filled(["Tokens stay by", "from layer: kept", *columns], rows)
