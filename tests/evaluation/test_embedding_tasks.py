"""Embedding tasks are read from the field's layouts and measured by its own evaluators."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch
from sentence_transformers import SentenceTransformer

import slimformer
from embedding_data import GOLD, PAIRS, TEXTS, beir, pipeline, tsv
from real_models import minilm
from slimformer import EarlyExit
from slimformer.errors import CalibrationError, DataError
from slimformer.evaluation.embedding_tasks import (
    NeighbourTask,
    nearest,
    neighbour_agreement,
    read_task,
)
from slimformer.evaluation.retrieval import ir_evaluator, read_retrieval


@pytest.fixture
def model(tmp_path: Path) -> SentenceTransformer:
    return pipeline(tmp_path / "model")


@pytest.mark.parametrize("zipped", [False, True])
def test_a_beir_folder_is_read(tmp_path: Path, zipped: bool) -> None:
    task = read_retrieval(beir(tmp_path / "tiny", zipped))
    assert task.source == "tiny, 9 queries (test) on 40 documents"
    assert task.corpus["d3"] == f"{TEXTS[3].split()[0]} {TEXTS[3]}"
    assert task.relevant["q1"] == {"d1", "d10"}
    assert "q9" not in task.queries
    first, second = task.split()
    assert not set(first.queries) & set(second.queries)
    assert {*first.queries, *second.queries} == set(task.queries)
    assert first.corpus == second.corpus == task.corpus


def test_figures_are_those_of_the_evaluator(tmp_path: Path, model: SentenceTransformer) -> None:
    task = read_retrieval(beir(tmp_path / "tiny"))
    card = str(vars(model.model_card_data))
    for width, score in zip((32, 8), task.scores(model, (32, 8)), strict=True):
        evaluator = ir_evaluator()(task.queries, task.corpus, task.relevant, truncate_dim=width)
        measured = evaluator(pipeline(tmp_path / "other"))
        assert score == pytest.approx(measured["cosine_ndcg@10"], abs=1e-6)
        if width == 32:
            figures = task.figures(model)
            assert figures["Recall@10"] == pytest.approx(measured["cosine_recall@10"], abs=1e-6)
            assert figures["MAP@100"] == pytest.approx(measured["cosine_map@100"], abs=1e-6)
            assert figures["MRR@10"] == pytest.approx(measured["cosine_mrr@10"], abs=1e-6)
    assert str(vars(model.model_card_data)) == card


def test_the_evaluators_of_sentence_transformers_take_a_patched_model(
    tmp_path: Path, model: SentenceTransformer
) -> None:
    task = read_retrieval(beir(tmp_path / "tiny"))
    with slimformer.patched(model, EarlyExit(1)):
        measured = ir_evaluator()(task.queries, task.corpus, task.relevant)(model)
        assert measured["cosine_ndcg@10"] == pytest.approx(task.scores(model)[0], abs=1e-6)


@pytest.mark.parametrize(("file", "content", "message"), [
    ("qrels/test.tsv", None, r"no qrels/test\.tsv.*Expected corpus\.jsonl"),
    ("corpus.jsonl", None, r"neither corpus\.jsonl nor corpus\.jsonl\.gz"),
    ("corpus.jsonl", "", "is empty"),
    ("queries.jsonl", "no JSON\n", r"Line 1 of .*queries\.jsonl is not such a line"),
    ("queries.jsonl", '{"text": "a"}\n', r"KeyError\('_id'\)"),
    ("queries.jsonl", '{"_id": "q0", "text": ["a"]}\n', "a text of type list"),
    ("corpus.jsonl", '{"_id": "d0", "title": 3, "text": "a"}\n', "a text of type int"),
    ("qrels/test.tsv", "q0 d0 1\n", "Line 1 of .*'q0 d0 1"),
    ("qrels/test.tsv", "q0\td0\tmuch\n", "'q0.td0.tmuch"),
    ("qrels/test.tsv", "q0\tgone\t1\n", r"names 'gone', which corpus\.jsonl does not hold"),
    ("qrels/test.tsv", "q0\td0\t0\n", "no judgement with a score above 0"),
])  # fmt: skip
def test_a_damaged_folder_says_what_is_wrong(
    tmp_path: Path, file: str, content: str | None, message: str
) -> None:
    folder = beir(tmp_path / "tiny")
    (folder / file).unlink()
    if content is not None:
        (folder / file).write_text(content)
    with pytest.raises(DataError, match=message):
        read_retrieval(folder)


def test_pairs_are_measured_as_the_evaluator_of_sentence_transformers_does(
    tmp_path: Path,
) -> None:
    model = SentenceTransformer(str(minilm()), device="cpu")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        from sentence_transformers.evaluation import EmbeddingSimilarityEvaluator  # noqa: PLC0415
    task = read_task(tsv(tmp_path / "pairs.tsv"))
    assert task.source == "file pairs.tsv, 40 pairs"
    for width, score in zip((None, 8), task.scores(model, (None, 8)), strict=True):
        evaluator = EmbeddingSimilarityEvaluator(
            *map(list, zip(*PAIRS, strict=True)), GOLD, truncate_dim=width
        )
        assert score / 100 == pytest.approx(evaluator(model)["spearman_cosine"], abs=1e-3)
    judged, texts = task.apart()
    assert not set(judged.texts) & set(texts)
    assert len(judged.pairs) == 20


def test_neighbours_of_the_dense_model_are_found_by_the_dense_model_alone(model: SentenceTransformer) -> None:
    task = NeighbourTask("texts", TEXTS)
    with pytest.raises(CalibrationError, match="recorded"):
        task.scores(model)
    task = task.recorded(model)
    assert task.scores(model) == [1.0]
    with slimformer.patched(model):
        assert task.scores(model)[0] > 0.99
    with slimformer.patched(model, EarlyExit(1)):
        score, narrow = task.scores(model, (None, 4))
    assert narrow < score < 1


def test_nearest_leaves_out_the_text_itself_in_every_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    embeddings = torch.randn(50, 8, generator=torch.Generator().manual_seed(0))
    unit = torch.nn.functional.normalize(embeddings, dim=-1)
    cosine = (unit @ unit.T).fill_diagonal_(-2)
    monkeypatch.setattr("slimformer.evaluation.embedding_tasks._ROWS_AT_ONCE", 7)
    assert torch.equal(nearest(embeddings, 5), cosine.topk(5).indices)
    assert neighbour_agreement(nearest(embeddings, 5), nearest(-embeddings, 5)) == 1.0
    with pytest.raises(DataError, match="at least two"):
        nearest(embeddings[:1])
