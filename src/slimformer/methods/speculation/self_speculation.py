"""Draft tokens with a slim plan and check them with the model itself (SWIFT, arXiv 2410.06916)."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from slimformer.changes.ledger import Ledger
from slimformer.changes.running_calls import PATCH
from slimformer.decisions.policy import Decision, TokenPolicy
from slimformer.decisions.registry import plan_of, register
from slimformer.errors import PlanError
from slimformer.methods.speculation.draft_model import DraftModel, tensors_of
from slimformer.methods.speculation.generation import Speculating
from slimformer.model.anatomy import Anatomy, find_anatomy
from slimformer.model.layer_parts import Kind


@register("SelfSpeculation")
@dataclass(frozen=True)
class SelfSpeculation:
    """`generate` drafts with a slim plan and checks with the model: the same tokens in fewer of its steps.

    The draft is the model itself without some of its sublayers, over the same weights, and where the plan allows it
    over the same keys. How far it drafts is measured while it runs: it goes on as long as that pays, and stops
    drafting for a while where it does not. What stands in the text already is copied. Greedily, the tokens are those
    that the model gives alone, but for ties in rounding; sampled ones have the same distribution, not the same seed.

    A call that transformers' assisted generation cannot serve, such as one with beams, several texts, a static cache
    or attentions to return, runs as without this; `slimformer.status(model).generation` says why.

    Attributes:
        draft: The plan of the draft, or where it is: a method, a `Plan`, a folder, a file or a Hub id. Other methods
            that the model is patched with apply to the draft too.
        weights: What a saved plan keeps of the draft beside its JSON; leave it out.

    Raises:
        PlanError: If the draft is no plan, none of a model like this, or leaves nothing out.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> import slimformer
        >>> config = LlamaConfig(vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=4,
        ...                      num_attention_heads=2, num_key_value_heads=2)
        >>> draft = slimformer.LayerDrop(block=[1, 2])
        >>> model = slimformer.patch(LlamaForCausalLM(config), SelfSpeculation(draft))
        >>> slimformer.status(model).generation
        {'drafts': 'none yet'}
    """

    draft: Any
    weights: Mapping[str, Tensor] = field(default_factory=dict, compare=False, repr=False)

    def __post_init__(self) -> None:
        known = isinstance(self.draft, (str, os.PathLike, Mapping, TokenPolicy))
        if not known or isinstance(self.draft, SelfSpeculation):
            raise PlanError(
                "SelfSpeculation(draft=...) takes a plan that leaves something out, such as LayerDrop(block=[12]), or "
                f"where one is: a folder, a file or a Hub id. Got {type(self.draft).__name__}."
            )

    @property
    def plan(self) -> Any:
        """The draft's plan, read if need be."""
        if not isinstance(self.draft, TokenPolicy):
            object.__setattr__(self, "draft", plan_of(self.draft, self.weights))
        return self.draft

    def decisions(self, anatomy: Anatomy) -> dict[tuple[int, Kind], Decision]:
        """Nothing about the model itself, whose `generate` is changed."""
        if not anatomy.causal:
            raise PlanError(
                f"SelfSpeculation changes how text is generated, and {type(anatomy.stack).__name__} generates none."
            )
        drafted = self.plan.decisions(anatomy).values()
        if any(decision.not_evicted for decision in drafted):
            raise PlanError(
                "The draft lets tokens leave, which they do in a prompt, and drafts begin behind it. Leave it out of "
                "the draft; beside SelfSpeculation it shortens the prompt of both."
            )
        if not any(_saves(decision) for decision in drafted):
            raise PlanError(
                "The draft leaves nothing out, so that it is no faster than the model that checks it. Take a plan that "
                "drops layers: `slimformer calibrate draft` finds one."
            )
        return {(0, "attention"): Decision(prepares=(self._prepare,))}

    def settings(self) -> dict[str, Any]:
        """What a plan saves in the JSON: the draft's own."""
        return {"draft": self._kept.to_dict()}

    def tensors(self) -> dict[str, Tensor]:
        """What a plan saves beside the JSON: the draft's own."""
        found: dict[str, Tensor] = self._kept.tensors()
        return found

    @property
    def _kept(self) -> Any:
        return plan_of(self.plan, {})

    def _prepare(self, model: Any, ledger: Ledger) -> None:
        if not callable(getattr(model, "_get_candidate_generator", None)):
            raise PlanError(
                f"{type(model).__name__} has no `generate` that asks for candidates. Patch the model that generates, "
                "such as AutoModelForCausalLM gives."
            )
        patch = vars(find_anatomy(model).stack)[PATCH]
        speculating = Speculating(model, _Makes(self, model, patch), _Replays(patch.reports))
        speculating.draft = speculating.makes()
        speculating.had = ledger.set_method(model, "generate", speculating)
        speculating.had_candidates = ledger.set_method(
            model, "_get_candidate_generator", speculating.candidates
        )
        patch.reports["drafts"] = speculating.tally


@dataclass
class _Makes:
    """Makes the draft of a patched model."""

    method: SelfSpeculation
    model: Any
    patch: Any

    def __call__(self) -> DraftModel:
        tensors = tensors_of(self.model)
        draft, layout = self.patch.with_same_weights(self.model, self.method.plan, without=self.method)
        made = vars(find_anatomy(draft).stack)[PATCH]
        bounds = self.patch.bounds | made.bounds
        return DraftModel(draft, layout, self.patch.layout, bounds, _Replays(made.reports), tensors)


@dataclass
class _Replays:
    """Says whether the steps of a patched model are replayed from graphs."""

    reports: Mapping[str, Any]

    def __call__(self) -> bool:
        steps = self.reports.get("steps")
        return steps is not None and bool(steps.may_replay())


def _saves(decision: Decision) -> bool:
    return not decision.compute or bool(decision.rows) or bool(decision.changes)
