"""The panel: dense keeps exactly all of itself, figures equal their formulas, and bad input is refused."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast

import slimformer
from real_models import smollm2
from slimformer import LayerDrop, TokenElimination
from slimformer.cli.loading import load_model, load_tokenizer
from slimformer.errors import CalibrationError, DataError
from slimformer.evaluation.panel import Judgement, Kept, Panel, Prompt, equal, read_prompts
from slimformer.evaluation.panel.builtin import builtin_prompts, builtin_texts
from slimformer.evaluation.panel.capabilities.copying import copying_rows
from slimformer.evaluation.panel.capabilities.own_words import own_words
from slimformer.evaluation.panel.capabilities.predictions import Likelihoods, Predictions
from slimformer.evaluation.panel.capabilities.prompts import continued
from slimformer.evaluation.panel.capabilities.reading import Row, read
from slimformer.evaluation.panel.capabilities.retrieval import Retrieval, retrieval_prompts
from slimformer.evaluation.panel.capability import bootstrapped
from tiny_models import tiny_model

DROP = LayerDrop(attention=[1], mlp=[2])
_CHARACTERS = "abcdefghijklmnopqrstuvwxyz0123456789 .,\n?:TW"


def tokenizer() -> PreTrainedTokenizerFast:
    """One token per character, digits among them, as many as a tiny model's vocabulary holds."""
    words = ["<pad>", "<bos>", "<eos>", "<unk>", *_CHARACTERS]
    made = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Split(Regex("[\\s\\S]"), "isolated")
    made.decoder = decoders.Fuse()
    special = {name: f"<{name[:3]}>" for name in ("pad_token", "bos_token", "eos_token", "unk_token")}
    return PreTrainedTokenizerFast(tokenizer_object=made, model_max_length=4096, **special)


def peaked(name: str, **overrides: object) -> PreTrainedModel:
    """A tiny model whose predictions are far from uniform."""
    model = tiny_model(name, max_position_embeddings=1024, **overrides)
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(40)
    return model


def rows(lengths: Sequence[tuple[int, int]] = ((9, 5), (4, 7), (12, 3), (9, 140))) -> list[Row]:
    drawn = torch.Generator().manual_seed(5)
    return [
        Row(
            torch.randint(4, 60, (a,), generator=drawn).tolist(),
            torch.randint(4, 60, (b,), generator=drawn).tolist(),
            "ab"[i % 2],
        )
        for i, (a, b) in enumerate(lengths)
    ]


def log_probs(model: PreTrainedModel, row: Row) -> Tensor:
    """What one plain forward predicts for the scored tokens."""
    with torch.no_grad():
        logits = model(torch.tensor([[*row.context, *row.scored]])).logits[0].double()
    return logits[len(row.context) - 1 : -1].log_softmax(-1)


@pytest.mark.parametrize("tokens_at_once", [1, 30, 4000])
@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2", "qwen3"])
def test_rows_are_read_as_one_plain_forward_reads_them_however_they_are_batched(
    name: str, tokens_at_once: int
) -> None:
    model = peaked(name)
    with slimformer.patched(model, DROP):
        found: dict[int, list[Tensor]] = {}
        for piece in read(model, rows(), tokens_at_once):
            assert piece.start == sum(len(part) for part in found.get(piece.row, []))
            found.setdefault(piece.row, []).append(piece.logits.double().log_softmax(-1))
        for index, row in enumerate(rows()):
            torch.testing.assert_close(torch.cat(found[index]), log_probs(model, row), atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_the_dense_model_keeps_exactly_all_of_itself(name: str, dtype: torch.dtype) -> None:
    model = peaked(name).to(dtype)
    panel = Panel.recorded(model, tokenizer(), budget="quick", prompts=[Prompt("a b"), Prompt("d e f")])
    judgement = panel.judged(model)
    assert {of.name for of in judgement.capabilities} >= {"text", "own words", "yours"}
    assert [(of.kept, of.spread) for of in judgement.capabilities] == [(1.0, 0.0)] * len(
        judgement.capabilities
    )
    assert (judgement.score, judgement.spread, judgement.mean) == (1.0, 0.0, 1.0)
    slim = panel.measured(model, DROP)
    assert all(0 <= of.kept < 1 and of.spread > 0 for of in slim.capabilities)
    assert equal(judgement, panel.judged(model))
    assert not equal(judgement, slim)


def test_predictions_keep_what_the_divergence_leaves() -> None:
    model = peaked("llama")
    found = Predictions.recorded("text", model, rows(), seed=0)
    dense = [log_probs(model, row) for row in rows()]
    with slimformer.patched(model, DROP):
        slim = [log_probs(model, row) for row in rows()]
        kept = found.judged(model)
    nats = [(a.exp() * (a - b)).sum() for a, b in zip(dense, slim, strict=True)]
    tokens = sum(len(row.scored) for row in rows())
    assert kept.figures["divergence"] == pytest.approx(float(sum(nats)) / tokens, rel=1e-4)
    assert kept.kept == pytest.approx(math.exp(-float(sum(nats)) / tokens), rel=1e-4)
    first = float(nats[0] + nats[2]) / (5 + 3)
    assert kept.parts["a"] == pytest.approx(math.exp(-first), rel=1e-4)
    same = [float((a.argmax(-1) == b.argmax(-1)).sum()) for a, b in zip(dense, slim, strict=True)]
    assert kept.figures["same_token"] == pytest.approx(sum(same) / tokens)


def test_likelihoods_keep_what_stands_above_chance() -> None:
    model, chance = peaked("llama"), 1e-9
    found = Likelihoods.recorded("copying", model, rows(), chance, seed=0)
    with slimformer.patched(model, DROP):
        kept = found.judged(model)
        slim = torch.tensor([likelihood(model, row) for row in rows()])
    dense = torch.tensor([likelihood(model, row) for row in rows()])
    parts = []
    for kind in (0, 1):
        count = sum(len(row.scored) for row in rows()[kind::2])
        before, after = (math.exp(float(values[kind::2].sum()) / count) for values in (dense, slim))
        parts.append((after - chance) / (before - chance))
    assert kept.kept == pytest.approx(min(max(sum(parts) / 2, 0), 1), rel=1e-3)
    with slimformer.patched(model, DROP):
        several = Likelihoods.recorded("copying", model, rows(), chance, seed=0, tokens_at_once=1)
    assert several.dense.tolist() == pytest.approx((-slim).tolist(), rel=1e-3)


def likelihood(model: PreTrainedModel, row: Row) -> float:
    return float(log_probs(model, row).gather(1, torch.tensor(row.scored)[:, None]).sum())


def test_keys_are_chosen_among_eight_and_dense_keeps_its_certainty() -> None:
    made = tokenizer()
    filler = made("the grass is green and nothing happens here. ")["input_ids"]
    prompts = retrieval_prompts(made, [1], filler, lengths=[400, 250, 60], count=8, seed=3)
    assert {len(one.row.context) for one in prompts} == {400, 250}
    texts = [made.decode(one.row.context) for one in prompts[:8]]
    assert [text.count("door is") - 1 for text in texts] == [1, 4] * 4
    for one, text in zip(prompts, texts, strict=False):
        assert len(set(one.choices)) == 8
        asked = text.rpartition("The code of the ")[2]
        told = text.partition(f"The code of the {asked.rstrip()} ")[2]
        assert told.startswith(made.decode(one.choices[:1]))
        assert one.row.scored == one.choices[:1]
    model = peaked("llama")
    found = Retrieval.recorded("retrieval", model, prompts, seed=0)
    last = log_probs(model, prompts[0].row)[0, prompts[0].choices]
    assert float(found.dense[0]) == pytest.approx(float(last.softmax(-1)[0]), rel=1e-3)
    assert (found.judged(model).kept, found.judged(model).spread) == (1.0, 0.0)


def test_repeated_sequences_come_at_once_and_behind_gaps_that_the_model_has_room_for() -> None:
    found, chance = copying_rows(
        range(4, 54), [1], [60, 61, 62], count=2, tokens=20, gaps=[50, 500], far=3, longest=100, seed=0
    )
    assert [row.group for row in found] == ["at once"] * 2 + ["50 tokens later"] * 3
    assert chance == 1 / 50
    whole = [*found[2].context, *found[2].scored]
    assert whole[1:21] == whole[-20:]
    assert whole[21:24] == [60, 61, 62]
    assert len(whole) == 1 + 20 + 50 + 20


def test_what_the_dense_model_cannot_do_is_left_out_with_the_reason() -> None:
    flat = tiny_model("llama", max_position_embeddings=1024)
    panel = Panel.recorded(flat, tokenizer(), budget="quick", prompts=[Prompt("a", "b"), Prompt("c", "d")])
    assert "does not copy" in panel.left_out["copying"]
    assert "does not find the keys" in panel.left_out["retrieval"]
    assert "no likelier than any others" in panel.left_out["yours"]
    assert panel.judged(flat).to_dict()["left_out"] == panel.left_out
    made = tokenizer()
    made.model_max_length = 24
    short = Panel.recorded(flat, made, budget="quick")
    assert "fit into the 24 tokens" in short.left_out["own words"]
    assert "24 tokens are too few for the keys" in short.left_out["retrieval"]
    assert [of.name for of in short.capabilities] == ["text"]


def test_tokens_that_leave_the_prompt_are_judged() -> None:
    model = peaked("llama")
    panel = Panel.recorded(model, tokenizer(), capabilities=["text"], budget="quick")
    gone = TokenElimination({1: 0.2}, window=1, sink=1, least=16)
    assert 0 < panel.measured(model, gone).capability("text").kept < 1
    assert panel.measured(model, TokenElimination({1: 0.2}, least=1000)).score == pytest.approx(1.0, abs=1e-4)


def test_the_spread_is_the_standard_error_and_resamples_repeat() -> None:
    nats = torch.rand(400, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def kept() -> Kept:
        return bootstrapped(
            "x", ["a"] * 400, lambda times: times @ nats / times.sum(1), {}, pooled=True, seed=4
        )

    assert kept().spread == pytest.approx(float(nats.std()) / 20, rel=0.1)
    assert torch.equal(kept().replicates, kept().replicates)


def test_plans_are_equal_when_they_are_nearer_than_their_spread() -> None:
    def judgement(*kept: float, spread: float = 0.02, names: str = "ab") -> Judgement:
        return Judgement([Kept(name, value, spread, 8) for name, value in zip(names, kept, strict=False)])

    assert equal(judgement(0.9, 0.8), judgement(0.91, 0.79))
    assert not equal(judgement(0.9, 0.8), judgement(0.7, 0.6))
    assert judgement(0.9, 0.5).worst.name == "b"
    assert judgement(0.9, 0.5).score == pytest.approx((0.7 + 0.5) / 2)
    with pytest.raises(CalibrationError, match="One judgement is of a, b and the other of a, c"):
        equal(judgement(0.9, 0.8), judgement(0.9, 0.8, names="ac"))
    with pytest.raises(CalibrationError, match="'yours' was not measured"):
        judgement(0.9, 0.8).capability("yours")


def test_what_the_dense_model_wrote_is_kept_and_read_again(tmp_path: Path) -> None:
    model, made = peaked("llama"), tokenizer()
    asked = [("x", "a question?"), ("y", "another one, longer.")]
    options = {"new_tokens": 6, "longest": 512, "chat": None}
    first = own_words(model, made, asked, cache=tmp_path, **options)
    again = own_words(model, made, asked, cache=tmp_path, **options)
    assert (first.reused, again.reused) == (False, True)
    assert (again.rows, again.digest) == (first.rows, first.digest)
    (file,) = tmp_path.iterdir()
    for damage in ('{"answers": [[1], [99999]]}', '{"answers": [[1]]}', "{", "[]"):
        file.write_text(damage)
        assert own_words(model, made, asked, cache=tmp_path, **options) == first
    own_words(peaked("llama", num_hidden_layers=3), made, asked, cache=tmp_path, **options)
    own_words(model, made, asked, cache=tmp_path, **{**options, "new_tokens": 5})
    assert len(list(tmp_path.iterdir())) == 3
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="cannot be kept in"):
        own_words(model, made, asked, cache=tmp_path / "file", **options)


def test_answers_are_greedy_and_end_with_the_token_that_ends_them() -> None:
    model = peaked("llama")
    prompts = [row.context for row in rows()]
    free = continued(model, prompts, 8)
    for prompt, answer in zip(prompts, free, strict=True):
        row = Row(prompt, answer)
        assert log_probs(model, row).argmax(-1).tolist() == answer
    model.generation_config.eos_token_id = [free[0][2], 63]
    stopped = continued(model, prompts, 8)
    assert stopped[0] == free[0][: free[0].index(free[0][2]) + 1]


def test_prompts_go_through_the_chat_template_and_a_failing_one_is_named() -> None:
    model, made = peaked("llama"), tokenizer()
    options = {"budget": "quick", "capabilities": ["own words"]}
    with pytest.raises(DataError, match=r"chat=True .* has none"):
        Panel.recorded(model, made, chat=True, **options)
    plain = Panel.recorded(model, made, **options)
    made.chat_template = "W {{ messages[0]['content'] }} T"
    chatted = Panel.recorded(model, made, **options)
    assert plain.record["own_words"]["digest"] != chatted.record["own_words"]["digest"]
    assert chatted.capabilities[0].rows[0].context[0] == made.convert_tokens_to_ids("W")
    made.chat_template = "{{ raise_exception('only systems may speak') }}"
    with pytest.raises(DataError, match=r"template fails .*only systems may speak.* chat=False"):
        Panel.recorded(model, made, **options)
    assert Panel.recorded(model, made, chat=False, **options).capabilities


def test_your_prompts_are_judged_by_likelihood_or_by_what_is_written(tmp_path: Path) -> None:
    model, made = peaked("llama"), tokenizer()
    options = {"budget": "quick", "capabilities": ["yours"]}
    asked = ["one plus one", "two plus two", "three"]
    ids = [made(text)["input_ids"] for text in asked]
    written = continued(model, ids, 30)
    # The model is to end its answers somewhere.
    model.generation_config.eos_token_id = max(set(written[0][1:]), key=written[0][1:].count)
    answers = [made.decode(answer, skip_special_tokens=True) for answer in continued(model, ids, 30)]
    file = tmp_path / "mine.jsonl"
    lines = [{"prompt": a, "answer": b} for a, b in zip(asked, answers, strict=True)]
    lines[2]["answer"] = "something else"
    file.write_text("\n".join(map(json.dumps, lines)))
    panel = Panel.recorded(model, made, prompts=file, prompts_by="match", **options)
    kept = panel.judged(model).capability("yours")
    assert (kept.kept, kept.spread) == (1.0, 0.0)
    assert 0 < kept.figures["right_dense"] < 1
    assert panel.measured(model, LayerDrop(block=[0, 1, 2])).capability("yours").kept == 0.0
    file.write_text("\n".join(map(json.dumps, lines[:2])))
    panel = Panel.recorded(model, made, prompts=file, **options)
    assert panel.record["prompts"] == "file mine.jsonl, 2 prompts"
    (likely,) = panel.capabilities
    assert [row.context for row in likely.rows] == ids[:2]
    assert made.decode(likely.rows[0].scored).strip() == answers[0].strip()
    assert panel.judged(model).score == 1.0
    (tmp_path / "mine.txt").write_text("one\n\ntwo\n\nthree")
    alone = Panel.recorded(model, made, prompts=tmp_path / "mine.txt", **options)
    assert alone.judged(model).score == 1.0
    assert 0 < alone.measured(model, DROP).score < 1


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", '{"prompt": "a", "answer": "b"}\n{"prompt": "c"}', "1 of the 2 prompts .* number 2"),
        ("a.jsonl", '{"prompt": "a"}', "holds 1 prompt,"),
        ("a.jsonl", '{"prompt": "a"}\n{"prompt"', "Line 2 .* is not JSON"),
        ("a.jsonl", '{"question": "a"}\n{"prompt": "b"}', "Line 1 .* no prompt"),
        ("a.jsonl", '{"prompt": "a", "answer": 3}\n', "answer that is no text: 3"),
        ("a.csv", "a,b", "of a kind that is not read"),
        ("", "", "There is no file"),
    ],
)
def test_a_file_of_prompts_that_cannot_be_judged_is_refused(
    tmp_path: Path, name: str, content: str, message: str
) -> None:
    file = tmp_path / (name or "none.jsonl")
    if name:
        file.write_text(content)
    with pytest.raises(DataError, match=message):
        read_prompts(file)


def test_what_cannot_be_judged_is_refused() -> None:
    model, made = peaked("llama"), tokenizer()
    with pytest.raises(DataError, match=r"Exact match .* have none"):
        Panel.recorded(model, made, prompts=[Prompt("a"), Prompt("b")], prompts_by="match")
    with pytest.raises(DataError, match="judged by 'likelihood' or 'match', got 'luck'"):
        Panel.recorded(model, made, prompts=[Prompt("a"), Prompt("b")], prompts_by="luck")
    with pytest.raises(DataError, match="at least two of Prompt"):
        Panel.recorded(model, made, prompts=["a", "b"])
    with pytest.raises(DataError, match="prompts of 5000 tokens, and the model reads 1 to 1024"):
        Panel.recorded(model, made, lengths=[5000], capabilities=["retrieval"])
    with pytest.raises(DataError, match="budget must be one of quick"):
        Panel.recorded(model, made, budget="huge")
    with pytest.raises(DataError, match="capabilities must be some of text"):
        Panel.recorded(model, made, capabilities=["speech"])
    with pytest.raises(CalibrationError, match="nothing to judge by"):
        Panel.recorded(model, made, capabilities=["yours"])
    with pytest.raises(DataError, match="text gives 0 rows"):
        Panel.recorded(model, made, texts=["short"])
    with pytest.raises(CalibrationError, match="makes embeddings"):
        Panel.recorded(tiny_model("bert"), made)
    with slimformer.patched(model, DROP), pytest.raises(CalibrationError, match="patched; a panel"):
        Panel.recorded(model, made)


def test_weights_that_give_nan_are_named() -> None:
    model, made = peaked("llama"), tokenizer()
    panel = Panel.recorded(model, made, capabilities=["text"], budget="quick")
    with torch.no_grad():
        model.get_output_embeddings().weight[5] = float("nan")
    with pytest.raises(CalibrationError, match="NaN or infinity"):
        panel.judged(model)


def test_the_same_seed_reads_the_same_rows() -> None:
    model, made = peaked("llama"), tokenizer()
    options = {
        "budget": "quick",
        "capabilities": ["text"],
        "texts": [t for of in builtin_texts().values() for t in of],
    }
    first, again, other = (Panel.recorded(model, made, seed=seed, **options) for seed in (1, 1, 2))
    assert first.record["rows"] == again.record["rows"] != other.record["rows"]
    assert first.measured(model, DROP) == again.measured(model, DROP)


def test_built_in_prompts_are_many_and_different() -> None:
    prompts = [text for _, text in builtin_prompts()]
    assert len(set(prompts)) == len(prompts) == 60


def test_without_early_attentions_a_real_model_no_longer_copies() -> None:
    folder = str(smollm2())
    model, made = load_model(folder, "cpu", "float32"), load_tokenizer(folder)
    panel = Panel.recorded(model, made, budget="quick", capabilities=["copying"])
    assert panel.judged(model).score == 1.0
    early = panel.measured(model, LayerDrop(attention=[1, 2, 3]))
    late = panel.measured(model, LayerDrop(attention=[26, 27, 28]))
    assert early.score < 0.2 < 0.5 < late.score
    assert not equal(early, late)
