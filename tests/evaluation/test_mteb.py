"""mteb evaluates a patched pipeline on local data, and agrees with sentence-transformers' evaluator."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import slimformer
from embedding_data import beir, pipeline
from slimformer import EarlyExit
from slimformer.evaluation.retrieval import read_retrieval
from slimformer.integrations.mteb import mteb_task

mteb = pytest.importorskip("mteb", reason="the extra mteb is not installed")


def test_mteb_gives_the_figures_of_the_evaluator(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    model, task = pipeline(tmp_path / "model"), read_retrieval(beir(tmp_path / "tiny"))
    found = []
    noise = torch.randn(32, 33, generator=torch.Generator().manual_seed(0))
    head = {"head.weight": 20 * noise[:, :32], "head.bias": noise[:, 32]}
    for method in (None, EarlyExit(1, head)):
        slimformer.patch(model, *([] if method is None else [method]))
        for part in (task, task.split()[1]):
            result = mteb.evaluate(model, [mteb_task(part)], cache=None, show_progress_bar=False)
            found.append(result.task_results[0].get_score())
            assert found[-1] == pytest.approx(part.figures(model)["nDCG@10"], abs=1e-4)
    assert len(set(found)) == 4
