"""What `slimformer eval` does: quality, the panel, and tasks of other libraries, each beside the dense model."""

# Commands import torch when they run, so that --help does not wait for it.
# ruff: noqa: PLC0415

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import typer

from slimformer.cli.output import begun, note, print_json, print_tables, working

_logger = logging.getLogger("slimformer")
Value = TypeVar("Value")


def listed(given: str, option: str, read: Callable[[str], Value]) -> list[Value]:
    """The values of an option that takes several, separated by commas.

    Raises:
        typer.BadParameter: If one cannot be read.
    """
    try:
        found = [read(part.strip()) for part in given.split(",") if part.strip()]
    except ValueError as error:
        raise typer.BadParameter(f"{option} takes values separated by commas, got {given!r}.") from error
    if not found:
        raise typer.BadParameter(f"{option} takes values separated by commas, got none.")
    return found


@dataclass
class Judging:
    """One call of the command; models are loaded when they are first needed.

    Attributes:
        model: A checkpoint's folder or Hub id.
        path: The plan's.
        data: Text; None for what is built in.
        text_field: Its field.
        seed: Which of it is read.
        device: Where the model runs.
        dtype: What it is held in.
        budget: How much the panel reads.
        lengths: Of the prompts with keys.
        prompts: The user's file of prompts.
        prompts_by: How they are judged.
        words: Where own words are kept.
    """

    model: str
    path: str
    data: str | None
    text_field: str
    seed: int
    device: str
    dtype: str
    budget: Any
    lengths: Sequence[int] | None
    prompts: Path | None
    prompts_by: Any
    words: Path | None

    @cached_property
    def plan(self) -> Any:
        """The plan."""
        from slimformer.plans.plan import Plan

        return Plan.from_pretrained(self.path)

    @cached_property
    def loaded(self) -> Any:
        """The dense model."""
        from slimformer.cli.loading import load_model

        return load_model(self.model, self.device, self.dtype)

    @cached_property
    def tokenizer(self) -> Any:
        """Its tokenizer."""
        from slimformer.cli.loading import load_tokenizer

        return load_tokenizer(self.model)

    @cached_property
    def embedder(self) -> Any:
        """The dense embedding pipeline."""
        from slimformer.cli.loading import load_embedder

        return load_embedder(self.model, self.device, self.dtype)

    @cached_property
    def writes(self) -> bool:
        """Whether the model predicts tokens."""
        from slimformer.evaluation.readable import predicts_tokens
        from slimformer.model.anatomy import find_anatomy

        return predicts_tokens(self.loaded, find_anatomy(self.loaded))

    def check(self, save: bool) -> None:
        """Read the plan and the prompts, so that what is wrong with them is said before a model is loaded.

        Raises:
            PlanError: If the plan cannot be read, or figures are to be kept with one that is in no folder here.
            DataError: If the prompts cannot be judged.
        """
        from slimformer.cli.work import plan_folder
        from slimformer.evaluation.panel.capabilities.yours import check_answers, read_prompts

        _ = self.plan
        if save:
            plan_folder(self.path)
        if self.prompts is not None:
            check_answers(read_prompts(self.prompts)[0], self.prompts_by)

    def quality(self, blocks: int | None, sequence_length: int) -> dict[str, Any]:
        """Perplexity and divergence on text, or the cosine of embeddings."""
        from slimformer.cli.work import evaluate

        figures, source = evaluate(
            self.loaded,
            self.tokenizer,
            self.plan,
            data=self.data,
            text_field=self.text_field,
            blocks=blocks,
            sequence_length=sequence_length,
            seed=self.seed,
        )
        return {**figures, "data": source}

    def task(self, source: str) -> dict[str, Any]:
        """Every figure of the user's task for embeddings."""
        import slimformer

        task = _unread_task(self.plan, source, self.text_field)
        model = self.embedder
        with working("measuring embeddings"):
            task = task.recorded(model)
            dense = task.figures(model)
            with slimformer.patched(model, self.plan):
                slim = task.figures(model)
        return {"data": task.source, "dense": dense, "slim": slim}

    def panel(self, task: str | None) -> dict[str, Any]:
        """Every capability."""
        from slimformer.evaluation.panel import Panel, embedding_panel

        texts, source = self._texts()
        begun(f"measuring capabilities, --panel {self.budget}")
        if task is not None or not self.writes:
            refused = {"--lengths": self.lengths, "--prompts": self.prompts, "--words": self.words}
            given = [name for name, value in refused.items() if value is not None]
            if given:
                raise typer.BadParameter(f"{', '.join(given)} go with models that predict tokens.")
            model = self.loaded if task is None else self.embedder
            recorded = embedding_panel(
                model,
                self.tokenizer if task is None else None,
                texts=texts,
                text_source=source,
                task=None if task is None else _unread_task(self.plan, task, self.text_field),
                budget=self.budget,
                seed=self.seed,
            )
        else:
            model = self.loaded
            recorded = Panel.recorded(
                model,
                self.tokenizer,
                texts=texts,
                text_source=source,
                prompts=self.prompts,
                prompts_by=self.prompts_by,
                lengths=self.lengths,
                budget=self.budget,
                cache=self._words(),
                seed=self.seed,
                progress=True,
            )
        return recorded.measured(model, self.plan, progress=True).to_dict()

    def tasks(self, names: Sequence[str], limit: int | None) -> dict[str, Any]:
        """Tasks of lm-evaluation-harness, or of mteb for embeddings."""
        import slimformer

        if not self.writes:
            from slimformer.integrations.mteb import mteb_scores

            if limit is not None:
                raise typer.BadParameter("--limit goes with tasks of lm-evaluation-harness.")
            scores = mteb_scores(self.embedder, names)
            with slimformer.patched(self.embedder, self.plan):
                return {"dense": scores, "slim": mteb_scores(self.embedder, names)}
        from slimformer.integrations.lm_eval import lm_eval_scores

        dense = lm_eval_scores(self.loaded, self.tokenizer, names, limit=limit)
        with slimformer.patched(self.loaded, self.plan):
            slim = lm_eval_scores(self.loaded, self.tokenizer, names, limit=limit)
        found = {"dense": dense.values, "slim": slim.values, "standard_error": slim.errors}
        return found if limit is None else {**found, "limit": limit}

    def keep(self, measured: Mapping[str, Any], save: bool) -> None:
        """Write what was measured so far into the plan, so that an interruption loses only what was not done."""
        if save:
            from slimformer.cli.work import keep, plan_folder

            keep(plan_folder(self.path), self.plan, measured)

    def show(self, measured: Mapping[str, Any], as_json: bool) -> None:
        """Print everything."""
        from slimformer.report import comparison_table, panel_table

        kind = "task" if "task" in measured else "quality"
        figures = measured[kind]
        if as_json:
            print_json({**figures, **{name: measured[name] for name in measured if name != kind}})
            return
        rows = {name: value for name, value in measured.items() if name != "panel"}
        tables = [panel_table(measured)] if "panel" in measured else []
        print_tables(*tables, comparison_table(rows, f"quality on {figures['data']}"))

    def _texts(self) -> tuple[list[str] | None, str]:
        """The user's texts; None for those built in."""
        if self.data is None:
            return None, ""
        from slimformer.cli.work import unread_texts

        return unread_texts(self.plan, self.data, self.text_field, 2**16)

    def _words(self) -> Path | None:
        """Where own words are kept: where the user says, else in the checkpoint's folder if that can be written."""
        if self.words is not None:
            return self.words
        folder = Path(self.model)
        if folder.is_dir() and os.access(folder, os.W_OK):
            note(
                f"What the dense model writes is kept in {folder} for next time; --words names another folder."
            )
            return folder
        note(
            "What the dense model writes is not kept, since there is no folder for it: name one with --words."
        )
        return None


def _unread_task(plan: Any, source: str, text_field: str) -> Any:
    """A task for embeddings; where the plan was chosen by it, only the part that was held out then.

    Raises:
        DataError: If it cannot be read.
    """
    from slimformer.evaluation.embedding_tasks import EmbeddingTask, read_task

    task: EmbeddingTask = read_task(source, text_field=text_field)
    arguments = plan.provenance.get("arguments")
    said = arguments if isinstance(arguments, dict) else {}
    # Plans of version 0.1.0 call it the objective.
    chosen_by = str(said.get("task") or said.get("objective") or plan.provenance.get("data"))
    if chosen_by == task.source:
        _logger.warning(
            "The plan was chosen by all of this task, so its quality is overestimated: measure by another."
        )
    elif chosen_by.startswith(task.source):
        return task.split()[1]
    return task
