"""The plans of a real model: what is removed or routed, how that is chosen, and their repair."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import slimformer
from benchmarks.frame.inputs import BOOKS, C4, WIKI_DEMO, kept
from benchmarks.frame.registry import Settings
from benchmarks.quality.mixture_of_depths import instructions
from slimformer import LayerDrop, MixtureOfDepths, Plan
from slimformer.model.anatomy import find_anatomy
from slimformer.training.loop import TrainingSettings
from slimformer.training.repair import usual_settings

Chosen = Literal["cosine", "filter", "greedy", "panel", "panel-filter", "routed"]
# How units are chosen, in words.
CHOSEN: dict[Chosen, str] = {
    "cosine": "cosine",
    "filter": "greedy KL, filters left",
    "greedy": "greedy KL",
    "panel": "panel",
    "panel-filter": "panel, filters left",
    "routed": "half of the tokens routed past",
}
_UNITS = {"attention": "attentions", "block": "blocks", "mlp": "MLPs", "joint": "attentions and MLPs"}
_KINDS = {"joint": ("attention", "mlp")}
_ROUTERS = TrainingSettings(steps=600, rows=4, learning_rate=5e-3)
OWN_WORDS = "own-words"
_LONG_TEXTS = (WIKI_DEMO, f"{BOOKS}Moby-Dick--Or-The-Whale.txt", f"{BOOKS}Great-Expectations.txt")
_PIECE = 4000


@dataclass(frozen=True)
class Case:
    """A plan.

    Attributes:
        unit: What is removed or routed: "attention", "block", "mlp", or "joint" for attentions and MLPs.
        number: How many of them.
        chosen: How.
        repaired: Whether it is repaired.
        seed: Of the repair.
        texts: Whether texts of several kinds stand in for what is built in, to choose by and to repair with.
    """

    unit: str
    number: int
    chosen: Chosen
    repaired: bool = False
    seed: int = 0
    texts: bool = False

    @property
    def key(self) -> str:
        """For `--only`, and for the folder of the plan."""
        seed = f"-seed{self.seed}" if self.seed else ""
        texts = "-texts" if self.texts else ""
        return f"{self.unit}-{self.number}-{self.chosen}{texts}{'-repaired' if self.repaired else ''}{seed}"

    @property
    def name(self) -> str:
        """In words, the same for all seeds."""
        ending = (", several texts" if self.texts else "") + (", repaired" if self.repaired else "")
        return f"{self.number} {_UNITS[self.unit]}, {CHOSEN[self.chosen]}{ending}"

    def as_chosen(self) -> Case:
        """The same before its repair."""
        return replace(self, repaired=False, seed=0)


_AS_CHOSEN = (
    *(Case("attention", 7, chosen) for chosen in ("cosine", "filter", "greedy", "panel", "panel-filter")),
    *(Case("attention", number, "panel") for number in (3, 5, 14)),
    Case("block", 4, "cosine"),
    Case("block", 4, "panel"),
    Case("mlp", 4, "panel"),
    Case("joint", 8, "panel"),
    Case("attention", 7, "panel-filter", texts=True),
    Case("attention", 14, "panel-filter", texts=True),
    Case("block", 4, "panel", texts=True),
    # As much as 7 attentions that are gone.
    Case("attention", 14, "routed"),
)
_REPAIRED = (
    Case("attention", 7, "panel", repaired=True),
    Case("attention", 7, "panel-filter", repaired=True),
    Case("attention", 14, "panel", repaired=True),
    Case("block", 4, "panel", repaired=True),
    Case("block", 4, "cosine", repaired=True),
    Case("attention", 7, "cosine", repaired=True),
    Case("joint", 8, "panel", repaired=True),
    Case("attention", 14, "routed", repaired=True),
    Case("attention", 7, "panel", repaired=True, texts=True),
    Case("attention", 7, "panel-filter", repaired=True, texts=True),
    Case("attention", 14, "panel-filter", repaired=True, texts=True),
    Case("block", 4, "panel", repaired=True, texts=True),
)
# The rows that are promised, with further seeds.
_PROMISED = (
    "attention-7-panel-filter-texts-repaired",
    "attention-14-panel-filter-texts-repaired",
    "block-4-panel-texts-repaired",
)
_AGAIN = tuple(replace(case, seed=seed) for case in _REPAIRED if case.key in _PROMISED for seed in (1, 2))
CASES = {case.key: case for case in (*_AS_CHOSEN, *_REPAIRED, *_AGAIN)}


@dataclass(frozen=True)
class Made:
    """A plan and what it took.

    Attributes:
        plan: The plan.
        choosing: Seconds in which it was chosen, and its routers trained.
        repairing: Seconds of its repair.
    """

    plan: Plan
    choosing: float
    repairing: float | None = None

    def values(self) -> dict[str, float]:
        """For a measurement; of a repair also whether it won anything, and the divergence before and after."""
        found = {"choosing_seconds": self.choosing}
        if self.repairing is not None:
            repair = self.plan.measured["repair"]
            found |= {"repair_seconds": self.repairing, "won": float(repair["won"])}
            found |= {name: repair[name] for name in ("divergence_before", "divergence_after")}
        return found

    def layers(self) -> str:
        """What is gone or routed."""
        routed = {
            f"{kind}s routed": getattr(method, kind)
            for method in self.plan.methods
            if isinstance(method, MixtureOfDepths)
            for kind in ("attention", "mlp")
        }
        dropped = {"attentions": self.plan.dropped("attention"), "MLPs": self.plan.dropped("mlp")}
        named = {name: sorted(layers) for name, layers in (dropped | routed).items() if layers}
        return "; ".join(f"{name} {' '.join(map(str, layers))}" for name, layers in named.items())


def made(settings: Settings, model: Any, tokenizer: Any, case: Case) -> Made:
    """The plan of a case from its folder, chosen and repaired first if it is not there."""
    folder = settings.plans / case.as_chosen().key
    plan, choosing = kept(folder, lambda: _chosen(settings, model, tokenizer, case))
    if not case.repaired:
        return Made(plan, choosing)
    better, repairing = kept(
        settings.plans / case.key, lambda: _repaired(settings, model, tokenizer, plan, case)
    )
    return Made(better, choosing, repairing)


def _chosen(settings: Settings, model: Any, tokenizer: Any, case: Case) -> Plan:
    number = settings.pick(case.number, 1)
    if case.chosen == "routed":
        return _routed(settings, model, tokenizer, number)
    common: dict[str, Any] = {"kinds": _KINDS.get(case.unit, (case.unit,)), "drop": number}
    # A run that is ended goes on from there.
    common["checkpoint"] = settings.plans / "choosing" / case.as_chosen().key
    filters = LayerDrop(replace="filter", taps=4)
    if case.chosen in ("panel", "panel-filter"):
        method = LayerDrop() if case.chosen == "panel" else filters
        data = _texts(settings) if case.texts else None
        return slimformer.calibrate(model, tokenizer, method, selection="panel", data=data, **common)
    common |= {"data": settings.data / C4, "hold_out": False, "budget": settings.pick("standard", "quick")}
    if case.chosen == "cosine":
        return slimformer.calibrate(model, tokenizer, LayerDrop(), selection="cosine", **common)
    method = filters if case.chosen == "filter" else LayerDrop()
    return slimformer.calibrate(model, tokenizer, method, selection="greedy", **common)


def _routed(settings: Settings, model: Any, tokenizer: Any, number: int) -> Plan:
    """Routers that half of the tokens pass, in the attentions that cost least to skip."""
    return slimformer.calibrate(
        model,
        tokenizer,
        MixtureOfDepths(keep=0.5),
        number=min(number, len(find_anatomy(model).layers) - 4),
        kinds=("attention",),
        metric="skip_cost",
        data=instructions(settings.data),
        length=settings.pick(512, 64),
        settings=settings.pick(_ROUTERS, TrainingSettings(steps=2)),
    )


def _repaired(settings: Settings, model: Any, tokenizer: Any, plan: Plan, case: Case) -> Plan:
    """`slimformer.repair` as it comes, for so many minutes."""
    if settings.smoke:
        tiny: dict[str, Any] = {"data": {"built-in": 1.0}, "panel": None, "length": 64, "every": 2, "rank": 2}
        return slimformer.repair(
            model, plan, tokenizer, settings=TrainingSettings(steps=2, rows=2, learning_rate=1e-3), **tiny
        )
    again = replace(usual_settings(model), seed=case.seed)
    return slimformer.repair(
        model,
        plan,
        tokenizer,
        data=_texts(settings) if case.texts else None,
        minutes=settings.training or 10.0,
        settings=again if case.seed else None,
        cache=_own_words(settings.plans),
    )


def _texts(settings: Settings) -> list[str]:
    """Web pages, encyclopedia and novels, in pieces; nothing of them is in a task."""
    found = [str(json.loads(line)["text"]) for line in (settings.data / C4).read_text("utf-8").splitlines()]
    for file in _LONG_TEXTS:
        whole = (settings.data / file).read_text(encoding="utf-8")
        found += [whole[begin : begin + _PIECE] for begin in range(0, len(whole), _PIECE)]
    return found


def _own_words(plans: Path) -> Path:
    """Where what the model writes is kept for all processes."""
    return plans / OWN_WORDS
