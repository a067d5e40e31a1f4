"""Long texts find rows in a position table that is too short for them, and short texts find those they always had."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from sentence_transformers import SentenceTransformer
from torch import Tensor, nn
from transformers import PreTrainedModel

import slimformer
from real_models import minilm
from slimformer import LayerDrop, Plan, SelfExtend, TempScale
from slimformer.errors import CalibrationError, DataError, PlanError, UnsupportedModelError
from slimformer.methods.absolute_positions import GroupedPositions, PositionInterpolation, RecurrentPositions
from slimformer.methods.context_windows import embed_in_windows, encode_in_windows, windows
from slow_rows import arguments, error, one_thread, outputs, small  # noqa: F401

MODELS = ["bert", "roberta", "mpnet", "distilbert"]
# Rows in front of the first token's: RoBERTa's tiny model pads with token 0, MPNet always with 1.
OFFSET = {"bert": 0, "roberta": 1, "mpnet": 2, "distilbert": 0}
METHODS = [GroupedPositions(3, 20), PositionInterpolation(3, 20), RecurrentPositions(20)]
CLOSE = 1e-5
methods = pytest.mark.parametrize("method", METHODS, ids=lambda method: type(method).__name__)
models = pytest.mark.parametrize("name", MODELS)


def row_of(method: Any, table: Tensor, place: int, trained: int) -> Tensor:
    """The row for the token at `place` of a long text, by the documentation."""
    if isinstance(method, GroupedPositions):
        return table[place // method.factor]
    if isinstance(method, RecurrentPositions):
        return table[place % trained]
    position = min(place / method.factor, trained - 1)
    low = int(position)
    high = min(low + 1, trained - 1)
    return table[low] * (1 - (position - low)) + table[high] * (position - low)


def with_long_table(
    model: PreTrainedModel, name: str, method: Any, trained: int, tokens: int
) -> PreTrainedModel:
    """The model with a table that has a row for every token of a long text."""
    longer = copy.deepcopy(model)
    embeddings, offset = longer.embeddings, OFFSET[name]
    table = embeddings.position_embeddings.weight.detach()
    rows = [*table[:offset], *(row_of(method, table[offset:], place, trained) for place in range(tokens))]
    embeddings.position_embeddings = nn.Embedding.from_pretrained(torch.stack(rows))
    embeddings.position_ids = torch.arange(len(rows))[None]
    if hasattr(embeddings, "token_type_ids"):
        embeddings.token_type_ids = torch.zeros(1, len(rows), dtype=torch.int64)
    return longer


@methods
@models
def test_long_texts_have_the_rows_of_the_rule(name: str, method: Any) -> None:
    model, given = small(name), arguments(name, [(0, 57), (0, 57)], 57)
    expected = outputs(with_long_table(model, name, method, 20, 57), given)
    dense = outputs(model, given)
    slimformer.patch(model, method)
    assert error(outputs(model, given), expected) <= CLOSE
    assert error(expected, dense) > 1e-3


@pytest.mark.parametrize(
    "method", [GroupedPositions(2), PositionInterpolation(2), RecurrentPositions()], ids=repr
)
@models
def test_texts_may_be_longer_than_the_table(name: str, method: Any) -> None:
    model, given = small(name), arguments(name, [(0, 211)], 211)
    trained = model.embeddings.position_embeddings.num_embeddings - OFFSET[name]
    assert trained < 211
    expected = outputs(with_long_table(model, name, method, trained, 211), given)
    slimformer.patch(model, method)
    assert error(outputs(model, given), expected) <= CLOSE


@methods
@models
def test_short_texts_are_bit_identical_whatever_ran_before(name: str, method: Any) -> None:
    model, short = small(name), arguments(name, [(0, 20), (0, 20)], 20)
    dense = outputs(model, short)
    slimformer.patch(model, method)
    assert torch.equal(outputs(model, short), dense)
    outputs(model, arguments(name, [(0, 57), (0, 30)], 57))
    assert torch.equal(outputs(model, short), dense)


@methods
@models
def test_an_embedding_ignores_batch_mates(name: str, method: Any) -> None:
    model, texts = slimformer.patch(small(name), method), [(0, 12), (0, 40), (0, 57)]
    given = arguments(name, texts, 60)
    together = outputs(model, given)
    for row, (_, length) in enumerate(texts):
        alone = outputs(model, {key: value[row : row + 1, :length] for key, value in given.items()})
        assert error(together[row : row + 1, :length], alone) <= CLOSE


@models
def test_position_ids_and_embeddings_of_the_callers_own_are_taken(name: str) -> None:
    model, given = slimformer.patch(small(name), METHODS[1]), arguments(name, [(0, 57)], 57)
    expected = outputs(model, given)
    ids = torch.arange(57)[None] + OFFSET[name]
    assert torch.equal(outputs(model, given, position_ids=ids), expected)
    embeds = model.get_input_embeddings()(given["input_ids"])
    assert torch.equal(
        outputs(model, {"attention_mask": given["attention_mask"]}, inputs_embeds=embeds), expected
    )


@models
def test_it_composes_with_temperature_and_dropped_sublayers(name: str) -> None:
    model, given = small(name), arguments(name, [(0, 57), (0, 57)], 57)
    others = [TempScale(0.7), LayerDrop(mlp=[1])]
    longer = with_long_table(model, name, METHODS[1], 20, 57)
    expected = outputs(slimformer.patch(longer, *others), given)
    slimformer.patch(model, *others, METHODS[1])
    assert error(outputs(model, given), expected) <= CLOSE


@methods
def test_undo_is_exact_and_plans_carry_it(method: Any, tmp_path: Path) -> None:
    model, given = small("roberta"), arguments("roberta", [(0, 57)], 57)
    before = {path: set(vars(module)) for path, module in model.named_modules()}
    state, dense = dict(model.state_dict()), outputs(model, given)
    placed = outputs(slimformer.patch(model, method), given)
    assert list(model.state_dict()) == list(state)
    reach = "texts of any length" if isinstance(method, RecurrentPositions) else "up to 60 tokens"
    assert slimformer.status(model)[0]["attention"].endswith(reach)
    Plan([method]).save_pretrained(tmp_path)
    assert Plan.from_pretrained(tmp_path).methods == (method,)
    assert torch.equal(outputs(slimformer.patch(model, str(tmp_path)), given), placed)
    slimformer.unpatch(model)
    assert {path: set(vars(module)) for path, module in model.named_modules()} == before
    assert torch.equal(outputs(model, given), dense)


@pytest.mark.parametrize("make", [
    lambda: GroupedPositions(1), lambda: GroupedPositions(2.0), lambda: PositionInterpolation(0),
    lambda: PositionInterpolation(2, 1), lambda: RecurrentPositions(0), lambda: GroupedPositions(2, True),
])  # fmt: skip
def test_settings_that_make_no_sense_are_refused(make: Callable[[], object]) -> None:
    with pytest.raises(PlanError, match="takes a whole number from 2 up"):
        make()


@pytest.mark.parametrize(("name", "chosen", "kind", "message"), [
    ("llama", [METHODS[0]], UnsupportedModelError, "LlamaModel has rotary positions. RopeScaling and SelfExtend"),
    ("modernbert", [METHODS[1]], UnsupportedModelError, "has rotary positions"),
    ("gpt2", [METHODS[2]], UnsupportedModelError, "GPT2Model has none there"),
    ("bert", [METHODS[0], METHODS[1]], PlanError, "GroupedPositions and PositionInterpolation both change positions"),
    ("bert", [GroupedPositions(2, 200)], PlanError, "more than the 128 positions"),
    ("bert", [SelfExtend(3, 8)], UnsupportedModelError, "PositionInterpolation, GroupedPositions"),
])  # fmt: skip
def test_what_does_not_fit_is_refused(
    name: str, chosen: list[Any], kind: type[Exception], message: str
) -> None:
    model = small(name)
    before = {path: set(vars(module)) for path, module in model.named_modules()}
    with pytest.raises(kind, match=message):
        slimformer.patch(model, *chosen)
    assert {path: set(vars(module)) for path, module in model.named_modules()} == before


@pytest.mark.parametrize("method", METHODS[:2], ids=repr)
def test_texts_beyond_the_capacity_are_refused(method: Any) -> None:
    model = slimformer.patch(small("bert"), method)
    with pytest.raises(DataError, match=r"61 tokens, and the limit is 60.*\(factor=4\) reaches that"):
        outputs(model, arguments("bert", [(0, 61)], 61))
    assert outputs(model, arguments("bert", [(0, 60)], 70)).shape == (1, 70, 32)


def test_windows_cover_a_text_without_overlap_and_end_with_its_last_tokens() -> None:
    assert windows(list("abcdefgh"), 4) == [list("abcd"), list("efgh")]
    assert windows(list("abcdefghi"), 4) == [list("abcd"), list("efgh"), list("fghi")]
    for bad, message in ((([], 4), "no windows"), ((["a"], 0), "from 1 up"), ((["a"], True), "from 1 up")):
        with pytest.raises(DataError, match=message):
            windows(*bad)


def test_a_long_text_is_the_normalised_mean_of_its_windows() -> None:
    model = small("bert")

    def embed(pieces: list[Any]) -> Tensor:
        mask = torch.tensor([[1] * len(piece) + [0] * (16 - len(piece)) for piece in pieces])
        ids = torch.tensor([[*piece, *[0] * (16 - len(piece))] for piece in pieces])
        hidden = outputs(model, {"input_ids": ids, "attention_mask": mask})
        return (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)

    long, short = [3 + i % 50 for i in range(40)], list(range(5, 15))
    got = embed_in_windows([long, short], 16, embed)
    each = embed([long[:16], long[16:32], long[24:], short])
    torch.testing.assert_close(got[0], nn.functional.normalize(each[:3].mean(0), dim=0))
    assert torch.equal(got[1], each[3])
    with pytest.raises(DataError, match=r"one vector for each of 4 windows, got \(3, 8\)"):
        embed_in_windows([long, short], 16, lambda pieces: torch.zeros(3, 8))
    with pytest.raises(DataError, match="no texts"):
        embed_in_windows([], 16, embed)


def test_a_pipeline_reads_long_texts_window_by_window() -> None:
    model = SentenceTransformer(str(minilm()), device="cpu")
    model.max_seq_length = 32
    words = [f"word{number % 7} of a long text" for number in range(30)]
    long, short = " ".join(words), "a short text"
    got = encode_in_windows(model, [long, short], batch_size=2)
    torch.testing.assert_close(got[1], torch.tensor(model.encode(short)), atol=1e-5, rtol=0)
    # The same windows by hand: [CLS] and [SEP] around each thirty tokens.
    tokens = model.tokenizer(long, add_special_tokens=False)["input_ids"]
    pieces = [tokens[start : start + 30] for start in range(0, len(tokens) - 30, 30)] + [tokens[-30:]]
    ids = torch.tensor([[101, *piece, 102] for piece in pieces])
    with torch.no_grad():
        each = model({"input_ids": ids, "attention_mask": torch.ones_like(ids)})["sentence_embedding"]
    torch.testing.assert_close(got[0], nn.functional.normalize(each.mean(0), dim=0), atol=1e-5, rtol=0)
    prompted = encode_in_windows(model, [short], prompt="query: ")
    torch.testing.assert_close(
        prompted[0], torch.tensor(model.encode(short, prompt="query: ")), atol=1e-5, rtol=0
    )
    with pytest.raises(DataError, match=r"length=2\) has no room for text besides 2 special tokens"):
        encode_in_windows(model, [long], 2)
    with pytest.raises(CalibrationError, match="takes a SentenceTransformer, got BertModel"):
        encode_in_windows(small("bert"), [long])
