"""The panel for embeddings: dense keeps exactly all of itself, and figures agree with the libraries' own."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import slimformer
from embedding_data import GOLD, PAIRS, TEXTS, beir, pipeline
from real_models import minilm
from slimformer import LayerDrop
from slimformer.errors import CalibrationError, DataError
from slimformer.evaluation.embedding_tasks import NeighbourTask, PairTask
from slimformer.evaluation.panel import embedding_panel
from slimformer.evaluation.panel.builtin import builtin_texts
from slimformer.evaluation.panel.embeddings import ndcg
from slimformer.evaluation.retrieval import read_retrieval
from tiny_checkpoints import tiny_tokenizer
from tiny_models import tiny_model

DROP = LayerDrop(block=[1, 2])


def test_the_dense_pipeline_keeps_exactly_all_of_itself(tmp_path: Path) -> None:
    model = pipeline(tmp_path / "model")
    tasks = (read_retrieval(beir(tmp_path / "beir")), NeighbourTask("mine", TEXTS))
    for task in tasks:
        panel = embedding_panel(model, task=task, budget="quick")
        judgement = panel.judged(model)
        assert [of.name for of in judgement.capabilities] == ["neighbours", "similarities", "yours"]
        assert [(of.kept, of.spread) for of in judgement.capabilities] == [(1.0, 0.0)] * 3
        slim = panel.measured(model, DROP)
        assert all(0 <= of.kept < 1 and of.spread > 0 for of in slim.capabilities[:2])


def test_a_transformers_model_is_judged_by_the_mean_of_its_last_hidden_states() -> None:
    model = tiny_model("bert")
    panel = embedding_panel(model, tiny_tokenizer(), texts=TEXTS, text_source="mine", budget="quick")
    assert panel.record["data"] == "mine"
    assert panel.judged(model).score == 1.0
    assert 0 < panel.measured(model, DROP).score < 1
    neighbours = panel.measured(model, DROP).capability("neighbours")
    assert set(neighbours.parts) == {"short", "middling", "long"}


def test_retrieval_is_measured_as_the_library_measures_it(tmp_path: Path) -> None:
    model, task = pipeline(tmp_path / "model"), read_retrieval(beir(tmp_path / "beir"))
    for methods in ((), (DROP,)):
        with slimformer.patched(model, *methods):
            assert float(ndcg(model, task).mean()) == pytest.approx(task.figures(model)["nDCG@10"], abs=1e-6)


def test_gold_scores_are_kept_as_far_as_the_correlation_is(tmp_path: Path) -> None:
    model = pipeline(tmp_path / "model")
    sign = 1 if PairTask("mine", PAIRS, GOLD).scores(model)[0] > 0 else -1
    task = PairTask("mine", PAIRS, [sign * value for value in GOLD])
    panel = embedding_panel(model, task=task, budget="quick")
    yours = panel.judged(model).capability("yours")
    assert (yours.kept, yours.spread) == (1.0, 0.0)
    assert yours.figures["task_dense"] == pytest.approx(task.scores(model)[0], abs=1e-6)
    with slimformer.patched(model, DROP):
        slim = panel.judged(model).capability("yours")
        assert slim.figures["task_slim"] == pytest.approx(task.scores(model)[0], abs=1e-6)
    against = PairTask("mine", PAIRS, [-sign * value for value in GOLD])
    assert "do not agree" in embedding_panel(model, task=against, budget="quick").left_out["yours"]


def test_a_real_model_keeps_more_without_one_layer_than_without_three() -> None:
    sentence_transformers = pytest.importorskip("sentence_transformers")
    model = sentence_transformers.SentenceTransformer(str(minilm()), device="cpu")
    texts = builtin_texts()["lists"] + builtin_texts()["dialogue"]
    lines = [line for text in texts for line in text.splitlines() if 20 < len(line) < 200]
    panel = embedding_panel(model, texts=lines[:60], budget="quick")
    assert panel.judged(model).score == 1.0
    one, three = (panel.measured(model, LayerDrop(block=layers)) for layers in ([4], [1, 2, 4]))
    assert 0.3 < three.score < one.score < 1


def test_what_cannot_be_judged_is_refused(tmp_path: Path) -> None:
    model = tiny_model("bert")
    with pytest.raises(DataError, match="needs its tokenizer"):
        embedding_panel(model)
    with pytest.raises(DataError, match="at least 6 texts"):
        embedding_panel(model, tiny_tokenizer(), texts=["one", "two"])
    with pytest.raises(DataError, match="budget must be one of"):
        embedding_panel(model, tiny_tokenizer(), budget="huge")
    with pytest.raises(CalibrationError, match="with a SentenceTransformer"):
        embedding_panel(model, tiny_tokenizer(), task=read_retrieval(beir(tmp_path / "beir")), budget="quick")
    with slimformer.patched(model, DROP), pytest.raises(CalibrationError, match="is patched"):
        embedding_panel(model, tiny_tokenizer())
    panel = embedding_panel(model, tiny_tokenizer(), budget="quick")
    with torch.no_grad():
        model.embeddings.word_embeddings.weight.fill_(float("nan"))
    with pytest.raises(CalibrationError, match="hold NaN"):
        panel.judged(model)
