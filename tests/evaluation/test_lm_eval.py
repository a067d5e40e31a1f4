"""lm-evaluation-harness judges a patched model on local data, and what it cannot run is said in its own words."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch

import slimformer
from slimformer import LayerDrop
from slimformer.errors import DataError
from slimformer.integrations.lm_eval import lm_eval_scores
from tiny_checkpoints import tiny_tokenizer
from tiny_models import tiny_model

DROP = LayerDrop(attention=[1], mlp=[2])
installed = pytest.mark.skipif(
    importlib.util.find_spec("lm_eval") is None, reason="the extra eval is not installed"
)


def task(folder: Path) -> dict[str, Any]:
    """Which of two words goes on; six questions."""
    words = ["cat", "sat", "mat", "dog", "run", "over", "hills", "of", "glass", "while"]
    lines = [
        {"question": f"{words[i]} {words[i + 1]}", "choices": [words[i + 2], words[i + 3]], "gold": i % 2}
        for i in range(6)
    ]
    (folder / "questions.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return {
        "task": "which_word",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(folder / "questions.jsonl")}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{gold}}",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }


def share_right(model: Any, made: Any, folder: Path) -> float:
    right = 0
    lines = [json.loads(line) for line in (folder / "questions.jsonl").read_text().splitlines()]
    for line in lines:
        found = []
        for choice in line["choices"]:
            ids = torch.tensor([made(f"{line['question']} {choice}")["input_ids"]])
            begin = len(line["question"])
            with torch.no_grad():
                scores = model(ids).logits[0, begin - 1 : -1].log_softmax(-1)
            found.append(float(scores.gather(1, ids[0, begin:, None]).sum()))
        right += found.index(max(found)) == line["gold"]
    return right / len(lines)


@installed
def test_the_harness_judges_the_patched_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    model, made = tiny_model("llama"), tiny_tokenizer()
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(40)
    config = task(tmp_path)
    for methods in ([], [DROP]):
        if methods:
            slimformer.patch(model, *methods)
        found = lm_eval_scores(model, made, [config], bootstrap_iters=10)
        assert found.values["which_word acc"] == pytest.approx(share_right(model, made, tmp_path))
        assert found.errors["which_word acc"] > 0
    slimformer.unpatch(model)


@installed
def test_a_task_that_cannot_be_run_is_said_in_the_words_of_the_harness(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    model, made = tiny_model("llama"), tiny_tokenizer()
    with pytest.raises(DataError, match=r"cannot run no_such_task: .*no_such_task"):
        lm_eval_scores(model, made, ["no_such_task"])
    absent = {**task(tmp_path), "dataset_kwargs": {"data_files": {"test": str(tmp_path / "gone.jsonl")}}}
    with pytest.raises(DataError, match=r"cannot run which_word: FileNotFoundError: .*gone\.jsonl"):
        lm_eval_scores(model, made, [absent])


def test_without_names_nothing_is_run() -> None:
    with pytest.raises(DataError, match="Expected names of tasks"):
        lm_eval_scores(tiny_model("llama"), tiny_tokenizer(), [""])


@pytest.mark.skipif(importlib.util.find_spec("lm_eval") is not None, reason="the extra eval is installed")
def test_without_the_harness_its_extra_is_named() -> None:
    with pytest.raises(DataError, match=r"slimformer\[eval\]"):
        lm_eval_scores(tiny_model("llama"), tiny_tokenizer(), ["hellaswag"])
