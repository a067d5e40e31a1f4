"""Perplexity and divergence equal their formulas, and quality compares the dense model with the patched one."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, kl_div
from transformers import AutoModel, AutoModelForCausalLM, BertTokenizer, PreTrainedModel

import slimformer
from slimformer import LayerDrop
from slimformer.errors import CalibrationError, DataError, PlanError
from slimformer.evaluation.divergence import DenseReference, compare, embedding_agreement
from slimformer.evaluation.perplexity import block_logits, perplexity, wikitext_blocks
from slimformer.evaluation.quality import measure_quality
from slimformer.evaluation.similarity_task import mean_pooled_embedder, read_sts, spearman_sts
from tiny_models import dropped, tiny_model

DROP = LayerDrop(attention=[1], mlp=[2])


def blocks(rows: int = 3, tokens: int = 10) -> Tensor:
    return torch.randint(3, 64, (rows, tokens), generator=torch.Generator().manual_seed(7))


def padded() -> dict[str, Tensor]:
    mask = torch.ones(3, 10, dtype=torch.long)
    mask[0, 6:] = 0
    return {"input_ids": blocks(), "attention_mask": mask}


def peaked(name: str) -> PreTrainedModel:
    """A tiny model whose head is scaled so that predictions are far from uniform."""
    model = tiny_model(name)
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(40)
    return model


def log_probs(model: PreTrainedModel) -> Tensor:
    with torch.no_grad():
        return model(blocks()).logits.double().log_softmax(-1)


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2"])
@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_perplexity_is_the_exponential_of_the_mean_loss(name: str, batch_size: int) -> None:
    model = peaked(name)
    picked = log_probs(model)[:, :-1].gather(-1, blocks()[:, 1:, None])
    expected = picked.mean().neg().exp().item()
    assert perplexity(model, blocks(), batch_size=batch_size) == pytest.approx(expected, rel=1e-5)
    reference = DenseReference.record(model, blocks(), batch_size=batch_size)
    assert reference.perplexity == pytest.approx(expected, rel=1e-5)


def test_perplexity_survives_more_tokens_than_one_chunk() -> None:
    model = tiny_model("llama", max_position_embeddings=1024)
    long = torch.randint(3, 64, (1, 600), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = model(long, labels=long).loss.exp().item()
    assert perplexity(model, long) == pytest.approx(expected, rel=1e-5)
    assert compare(model, DenseReference.record(model, long), long).divergence == pytest.approx(0, abs=1e-6)


def test_a_token_that_is_ruled_out_makes_perplexity_infinite() -> None:
    model = tiny_model("gpt2")
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(1e6)
    assert perplexity(model, blocks()) == math.inf


@pytest.mark.parametrize("top_k", [1, 8, 64, 512])
def test_divergence_is_the_full_one_with_the_whole_vocabulary_and_below_it_otherwise(top_k: int) -> None:
    model = peaked("llama")
    dense = log_probs(model)
    reference = DenseReference.record(model, blocks(), top_k=top_k, batch_size=2)
    assert reference.log_probs.shape == (3, 10, min(top_k, 64))
    with slimformer.patched(model, DROP):
        slim = log_probs(model)
        found = compare(model, reference, blocks(), batch_size=2)
        assert found.perplexity == pytest.approx(perplexity(model, blocks()))
    full = kl_div(slim, dense, log_target=True, reduction="sum").item() / 30
    assert full > 0.05
    if top_k >= 64:
        assert found.divergence == pytest.approx(full, rel=1e-4)
    else:
        kept = dense.topk(top_k).indices
        bucketed = [
            torch.cat([p.gather(-1, kept), p.exp().scatter(-1, kept, 0).sum(-1, keepdim=True).log()], -1)
            for p in (slim, dense)
        ]
        expected = kl_div(*bucketed, log_target=True, reduction="sum").item() / 30
        assert found.divergence == pytest.approx(expected, rel=1e-4)
        assert 0 < found.divergence < full
    same = (dense.argmax(-1) == slim.argmax(-1)).double().mean().item()
    assert found.agreement == pytest.approx(same)
    assert 0 < same < 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_model_equals_itself(dtype: torch.dtype) -> None:
    model = peaked("qwen3")
    found = compare(model, DenseReference.record(model, blocks(), top_k=4, dtype=dtype), blocks())
    assert found.divergence == pytest.approx(0, abs=1e-3 if dtype == torch.float16 else 1e-6)
    assert found.agreement == 1
    assert found.perplexity == pytest.approx(perplexity(model, blocks()))


def test_a_tie_for_the_first_choice_is_agreement() -> None:
    model = tiny_model("llama")
    reference = DenseReference.record(model, blocks())
    assert reference.agreement(torch.zeros(10, 64), 0) == 1


def test_gradients_flow_into_the_given_logits() -> None:
    model = peaked("llama")
    reference = DenseReference.record(model, blocks(), top_k=8)
    logits = torch.zeros(10, 64, requires_grad=True)
    loss = reference.divergence(logits, 1)
    loss.backward()
    step = logits.detach() - 0.1 * logits.grad
    assert torch.isfinite(logits.grad).all()
    assert reference.divergence(step, 1) < loss


@pytest.mark.parametrize("top_k", [4, 64])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_or_infinite_logits_are_refused_with_the_block(top_k: int, value: float) -> None:
    model = tiny_model("llama")
    reference = DenseReference.record(model, blocks())
    # Only blocks with this token are broken.
    token = int(blocks()[1, 4])
    first = int((blocks() == token).any(-1).nonzero()[0])
    with torch.no_grad():
        model.get_input_embeddings().weight[token] = value
    for call in (
        lambda: perplexity(model, blocks(), batch_size=2),
        lambda: DenseReference.record(model, blocks(), top_k=top_k),
        lambda: compare(model, reference, blocks()),
        lambda: measure_quality(model, DROP, blocks=blocks()),
    ):
        with pytest.raises(CalibrationError, match=f"block {first} hold NaN"):
            call()
    with torch.no_grad():
        encoder = tiny_model("bert")
        encoder.embeddings.word_embeddings.weight[token] = float("nan")
    with pytest.raises(CalibrationError, match="hold NaN"):
        measure_quality(encoder, DROP, batches=[padded()])
    assert slimformer.status(model) == {}


@pytest.mark.parametrize(("wrong", "message"), [
    (blocks()[0], r"got \(10,\) of torch.int64"),
    (blocks()[:0], r"got \(0, 10\)"),
    (blocks()[:, :1], r"at least 1 block of 2 tokens, got \(3, 1\)"),
    (blocks().float(), "of torch.float32"),
    ([[1, 2]], "got list"),
    (blocks() + 60, "and the model knows 0 to 63"),
    (blocks() - 60, "token ids from -"),
])  # fmt: skip
def test_what_is_no_matrix_of_token_ids_is_refused(wrong: object, message: str) -> None:
    model = tiny_model("llama")
    for call in (
        lambda: perplexity(model, wrong),
        lambda: DenseReference.record(model, wrong),
        lambda: measure_quality(model, DROP, blocks=wrong),
    ):
        with pytest.raises(DataError, match=message):
            call()


def test_sizes_shapes_and_heads_that_do_not_fit_are_refused() -> None:
    model = tiny_model("llama")
    reference = DenseReference.record(model, blocks())
    for arguments, message in (
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"top_k": 0}, "top_k must be at least 1, got 0"),
        ({"dtype": torch.bfloat16}, "got torch.bfloat16"),
    ):
        with pytest.raises(DataError, match=message):
            DenseReference.record(model, blocks(), **arguments)
    with pytest.raises(DataError, match=r"recorded on blocks of shape \(3, 10\), got \(2, 10\)"):
        compare(model, reference, blocks()[:2])
    with pytest.raises(DataError, match=r"= \(10, 64\) as recorded, got \(9, 64\)"):
        reference.divergence(torch.zeros(9, 64), 0)
    with pytest.raises(DataError, match="as recorded"):
        reference.agreement(torch.zeros(10, 63), 0)
    with pytest.raises(CalibrationError, match="AutoModelForCausalLM"):
        perplexity(AutoModel.from_config(model.config), blocks())
    with pytest.raises(DataError, match=r"equal shapes \[texts, hidden\], got \(2, 3\) and \(3, 3\)"):
        embedding_agreement(torch.ones(2, 3), torch.ones(3, 3))


def test_measuring_leaves_training_flags_and_needs_no_dropout_off() -> None:
    model = tiny_model("gpt2")  # its configuration has dropout
    expected = perplexity(model, blocks())
    model.train()
    model.transformer.h[1].eval()
    flags = [module.training for module in model.modules()]
    assert perplexity(model, blocks()) == expected
    next(block_logits(model, blocks(), 1))
    assert [module.training for module in model.modules()] == flags
    assert torch.is_grad_enabled()
    quality = measure_quality(model, DROP, blocks=blocks())
    assert quality.perplexity_dense == pytest.approx(expected)
    assert [module.training for module in model.modules()] == flags


@pytest.mark.parametrize("suffix", ["txt", "raw", "jsonl", None])
def test_long_texts_are_cut_as_gptq_does(suffix: str | None, tmp_path: Path) -> None:
    text = "abc\n\ndefgh"

    def tokenizer(given: str, **options: object) -> dict[str, list[int]]:
        return {"input_ids": [0, *map(ord, given)]}

    source: str | Path = text
    if suffix is not None:
        source = tmp_path / f"a.{suffix}"
        source.write_text('{"text": "abc"}\n{"text": "defgh"}' if suffix == "jsonl" else text)
    expected = [[0, *map(ord, "abc\n")], [*map(ord, "\ndefg")]]
    assert wikitext_blocks(source, tokenizer, sequence_length=5).tolist() == expected
    assert wikitext_blocks(source, tokenizer, sequence_length=5, count=1).tolist() == expected[:1]
    with pytest.raises(DataError, match="gives 11 tokens, and one block needs 12"):
        wikitext_blocks(source, tokenizer, sequence_length=12)
    with pytest.raises(DataError, match="must be at least 1, got 0 and 1"):
        wikitext_blocks(source, tokenizer, sequence_length=0, count=1)
    with pytest.raises(DataError, match=r"absent\.raw does not exist"):
        wikitext_blocks("absent.raw", tokenizer)


def test_quality_of_a_decoder_compares_dense_with_slim() -> None:
    model = peaked("llama")
    dense = perplexity(model, blocks())
    reference = DenseReference.record(model, blocks(), top_k=8)
    with slimformer.patched(model, DROP):
        slim = compare(model, reference, blocks())
    quality = measure_quality(model, DROP, blocks=blocks(), batch_size=2, top_k=8)
    assert quality.to_dict() == pytest.approx(
        {
            "perplexity_dense": dense,
            "perplexity_slim": slim.perplexity,
            "divergence": slim.divergence,
            "agreement": slim.agreement,
            "tokens": 30,
        }
    )
    assert quality.embedding_cosine is None
    assert slimformer.status(model) == {}


@pytest.mark.parametrize("name", ["bert", "mpnet", "modernbert", "qwen3"])
def test_quality_of_embeddings_is_the_cosine_of_masked_means(name: str) -> None:
    model, batch = tiny_model(name), padded()
    stack = model.base_model
    with torch.no_grad():  # freshly initialised sublayers add next to nothing
        for weight in model.parameters():
            weight.mul_(10 if weight.ndim == 2 else 1)

    def means() -> Tensor:
        with torch.no_grad():
            hidden = stack(**batch).last_hidden_state
        return torch.stack([hidden[0, :6].mean(0), hidden[1].mean(0), hidden[2].mean(0)])

    dense = means()
    with slimformer.patched(model, DROP):
        expected = cosine_similarity(dense, means()).mean().item()
    assert expected < 0.99
    halves = [{key: value[rows] for key, value in batch.items()} for rows in (slice(0, 1), slice(1, 3))]
    for batches in (batch, iter([batch]), halves):
        quality = measure_quality(model, DROP, batches=batches)
        assert quality.to_dict() == {"tokens": 26, "embedding_cosine": pytest.approx(expected, abs=1e-5)}
    assert slimformer.status(model) == {}


def test_quality_that_cannot_be_measured_is_refused() -> None:
    model = tiny_model("llama")
    for arguments in ({}, {"blocks": blocks(), "batches": [padded()]}):
        with pytest.raises(DataError, match="exactly one of blocks"):
            measure_quality(model, DROP, **arguments)
    for batches, message in (
        ([], "hold none"),
        ([{"tokens": blocks()}], r"got tokens \(3, 10\)"),
        ([blocks()], "got a value of type Tensor"),
    ):
        with pytest.raises(DataError, match=message):
            measure_quality(model, DROP, batches=batches)
    with pytest.raises(PlanError, match="allowed are 0 to 3"):
        measure_quality(model, LayerDrop(mlp=[4]), blocks=blocks())
    with pytest.raises(CalibrationError, match="BertModel is no decoder"):
        measure_quality(tiny_model("bert"), DROP, blocks=blocks())
    slimformer.patch(model, DROP)
    with pytest.raises(CalibrationError, match="unpatch first"):
        measure_quality(model, DROP, blocks=blocks())
    assert dropped(model) == {1: ["attention"], 2: ["mlp"]}


def test_sts_files_are_read_as_they_are(tmp_path: Path) -> None:
    path = tmp_path / "pairs.tsv"
    head = "score\tsentence1\tsentence2\n"
    path.write_text(head + '5.000\tHe said "yes.\tA "quote"\n0\tä\t\n', encoding="utf-8")
    assert read_sts(str(path)) == ([('He said "yes.', 'A "quote"'), ("ä", "")], [5.0, 0.0])
    for content, message in (
        ("1.0\ta\tb\n", "begins with '1.0"),
        (head, "no pairs"),
        (head + "high\ta\tb\n", "Line 2 of"),
        (head + "1.0\ta\tb\n2.0\ta\n", "Line 3 of"),
    ):
        path.write_text(content)
        with pytest.raises(DataError, match=message):
            read_sts(path)
    with pytest.raises(DataError, match="does not exist"):
        read_sts(tmp_path / "absent.tsv")


def test_sts_is_the_rank_correlation_of_cosines() -> None:
    angles = {"0": 0.0, "10": 0.17, "60": 1.05, "90": 1.57}

    def embed(texts: list[str]) -> Tensor:
        return torch.tensor([[math.cos(angles[text]), math.sin(angles[text])] for text in texts]) * 3

    pairs = [("0", "10"), ("0", "60"), ("0", "90")]
    assert spearman_sts(embed, pairs, [5, 3, 1]) == pytest.approx(100)
    assert spearman_sts(embed, pairs, [1, 3, 5]) == pytest.approx(-100)
    assert spearman_sts(embed, pairs, [5, 1, 3]) == pytest.approx(50)
    assert spearman_sts(lambda texts: embed(texts).numpy(), pairs, [5, 1, 3]) == pytest.approx(50)


def test_sts_that_cannot_be_ranked_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    pairs = [("a", "b"), ("c", "d")]
    for given, scores in ((pairs, [1.0]), (pairs[:1], [1.0]), (pairs, [2.0, 2.0])):
        with pytest.raises(DataError, match="two different scores"):
            spearman_sts(lambda texts: torch.eye(4), given, scores)
    for embeddings, message in (
        (torch.eye(4), "equally similar"),
        (torch.eye(3), r"for 4 texts, got \(3, 3\)"),
        (torch.full((4, 2), float("nan")), "with NaN"),
    ):
        with pytest.raises(CalibrationError, match=message):
            spearman_sts(lambda texts, found=embeddings: found, pairs, [1.0, 2.0])
    monkeypatch.setitem(sys.modules, "scipy.stats", None)
    with pytest.raises(DataError, match=r'pip install "slimformer\[embeddings\]"'):
        spearman_sts(lambda texts: torch.eye(4), pairs, [1.0, 2.0])


def test_the_embedder_takes_the_mean_of_real_tokens_and_follows_patches() -> None:
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "one", "two", "three"]
    tokenizer = BertTokenizer(vocab={word: index for index, word in enumerate(words)})
    model = tiny_model("bert").train()
    texts = ["one", "one two three", "two"]
    embeddings = mean_pooled_embedder(model, tokenizer, batch_size=2)(texts)
    assert model.training
    model.eval()
    for text, embedding in zip(texts, embeddings, strict=True):
        with torch.no_grad():
            mean = model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0].mean(0)
        torch.testing.assert_close(embedding, mean / mean.norm(), atol=1e-5, rtol=0)
    short = mean_pooled_embedder(model, tokenizer, max_length=3)
    torch.testing.assert_close(short(["one two three"]), short(["one"]))
    with slimformer.patched(model, DROP):
        assert not torch.allclose(mean_pooled_embedder(model, tokenizer)(texts), embeddings)
    with pytest.raises(DataError, match="must be at least 1, got 0 and 512"):
        mean_pooled_embedder(model, tokenizer, batch_size=0)
    for wrong in ([], "one"):
        with pytest.raises(DataError, match="Expected a list of texts"):
            short(wrong)
    tokenizer.pad_token = None
    with pytest.raises(DataError, match="no padding token"):
        mean_pooled_embedder(model, tokenizer)


def test_a_decoder_loaded_from_disk_measures_the_same(tmp_path: Path) -> None:
    model = peaked("llama")
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert measure_quality(again, DROP, blocks=blocks()) == measure_quality(model, DROP, blocks=blocks())
