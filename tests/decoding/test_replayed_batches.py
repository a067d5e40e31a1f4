"""Batches replayed from graphs give what an encoder gives alone; on the CPU, replaying is calling again."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import BertForSequenceClassification

import slimformer
from embedding_data import TEXTS, pipeline
from slimformer import EarlyExit, LayerDrop, TempScale, TokenElimination
from slimformer.changes.running_calls import PATCH
from slimformer.decoding import batching as batching_module
from slimformer.decoding import capture
from slimformer.methods import LogNScale
from tiny_models import ENCODERS, tiny_model


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(capture, "_CAPTURES", {"cpu": lambda: True})


def batch(*lengths: int, seed: int = 0, tokens: int | None = None) -> dict[str, Tensor]:
    """Texts of some lengths, padded behind their ends."""
    shape = (len(lengths), max(lengths) if tokens is None else tokens)
    ids = torch.randint(3, 64, shape, generator=torch.Generator().manual_seed(seed))
    mask = (torch.arange(shape[1]) < torch.tensor(lengths)[:, None]).long()
    return {"input_ids": ids * mask, "attention_mask": mask}


# All of one size: up to 4 texts of up to 32 tokens.
ALIKE = [batch(20, 31, 4), batch(9, 12, 30, 2, seed=1), batch(17, 32, 5, seed=2), batch(8, 8, 8, seed=3)]


def called(model: Any, given: dict[str, Any], **more: Any) -> Any:
    with torch.no_grad():
        return model(**given, **more)


def states(model: Any, given: dict[str, Any], **more: Any) -> Tensor:
    """Last hidden states of the tokens of texts `[tokens, hidden]`."""
    found: Tensor = called(model, given, **more).last_hidden_state
    mask = given.get("attention_mask")
    return found.flatten(0, 1) if mask is None else found[mask.bool()]


def batching(model: Any) -> Any:
    return next(vars(m)[PATCH] for m in model.modules() if PATCH in vars(m)).reports["batches"]


def near(ours: Tensor, theirs: Tensor) -> bool:
    return torch.allclose(ours, theirs, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ENCODERS)
def test_states_are_those_of_the_model_alone(name: str) -> None:
    model = tiny_model(name)
    expected = [states(model, given) for given in ALIKE]
    slimformer.patch(model)
    for given, right in zip(ALIKE, expected, strict=True):
        assert near(states(model, given), right)
    # A size that comes for the first time is not captured, and the call that captures is launched.
    assert (batching(model).batches, batching(model).captured) == (2, 1), str(batching(model))


def test_what_is_beside_the_states_comes_too() -> None:
    model = tiny_model("bert")
    typed = [
        {**given, "token_type_ids": given["attention_mask"] * (1 - i % 2)} for i, given in enumerate(ALIKE)
    ]
    expected = [called(model, given) for given in typed]
    slimformer.patch(model)
    for given, right in zip(typed, expected, strict=True):
        found = called(model, given)
        assert type(found) is type(right)
        assert found.last_hidden_state.shape == right.last_hidden_state.shape
        assert near(found.pooler_output, right.pooler_output)
    assert batching(model).batches == 2, str(batching(model))


def test_a_result_stays_when_the_next_batch_is_replayed() -> None:
    model = slimformer.patch(tiny_model("bert"))
    found = [called(model, given).last_hidden_state for given in ALIKE]
    kept = found[2].clone()
    assert not torch.equal(called(model, ALIKE[1]).last_hidden_state[:3, :30], kept[:, :30])
    assert torch.equal(found[2], kept)


def filtered() -> LayerDrop:
    """A filter that reads the tokens on both sides, and the mask with them."""
    generator = torch.Generator().manual_seed(0)
    weights = {
        "attention.1.weight": torch.randn(32, 3 * 32, generator=generator) / 10,
        "attention.1.bias": torch.randn(32, generator=generator) / 10,
    }
    return LayerDrop(attention=[1], replace="filter", taps=3, weights=weights)


@pytest.mark.parametrize(
    "method",
    [LayerDrop(attention=[1], mlp=[2]), filtered(), EarlyExit(3), TempScale(0.8)],
    ids=["drop", "filter", "exit", "tau"],
)
def test_with_a_plan_they_are_those_of_the_plan(method: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("bert")
    with monkeypatch.context() as without:
        without.setattr(capture, "_CAPTURES", {})
        slimformer.patch(model, method)
        expected = [states(model, given) for given in ALIKE]
    slimformer.patch(model, method)
    for given, right in zip(ALIKE, expected, strict=True):
        assert near(states(model, given), right)
    assert batching(model).batches == 2, str(batching(model))


@pytest.mark.parametrize(
    ("method", "why"),
    [(LogNScale(16), "depend on how long texts are"), (TokenElimination({1: 0.5}), "tokens are chosen")],
    ids=["log-n", "elimination"],
)  # fmt: skip
def test_what_depends_on_the_texts_is_launched(method: Any, why: str) -> None:
    model = slimformer.patch(tiny_model("bert"), method)
    assert why in slimformer.status(model).generation["batches"]
    assert "forward" not in vars(model) or type(vars(model)["forward"]).__name__ != "Batching"


def test_texts_without_a_mask_are_whole() -> None:
    model = tiny_model("bert")
    given = {"input_ids": ALIKE[3]["input_ids"]}
    expected = states(model, given)
    slimformer.patch(model)
    for _ in range(3):
        assert near(states(model, given), expected)
    assert batching(model).batches == 1, str(batching(model))


def test_heads_that_give_token_ids_by_place_are_served() -> None:
    torch.manual_seed(0)
    model = BertForSequenceClassification(tiny_model("bert").config).eval()
    expected = [called(model, given).logits for given in ALIKE]
    slimformer.patch(model)
    for given, right in zip(ALIKE, expected, strict=True):
        assert near(called(model, given).logits, right)
    assert batching(model).batches == 2, str(batching(model))


def test_what_has_no_token_ids_is_launched_and_said_to_be() -> None:
    model = tiny_model("bert")
    states_in = model.embeddings.word_embeddings(ALIKE[0]["input_ids"]).detach()
    given = {"inputs_embeds": states_in, "attention_mask": ALIKE[0]["attention_mask"]}
    expected = states(model, given)
    slimformer.patch(model)
    assert near(states(model, given), expected)
    assert "no token ids" in slimformer.status(model).generation["batches"]


def test_padding_in_front_stays_there() -> None:
    model = tiny_model("bert")
    given = {name: value.flip(1) for name, value in batch(20, 31, 4).items()}
    expected = states(model, given)
    slimformer.patch(model)
    for _ in range(3):
        assert near(states(model, given), expected)
    assert batching(model).batches == 1, str(batching(model))


def test_no_text_is_filled_up_beyond_the_positions_of_the_model() -> None:
    model = tiny_model("bert", max_position_embeddings=40)
    given = batch(39, 7)
    expected = states(model, given)
    slimformer.patch(model)
    for _ in range(3):
        assert near(states(model, given), expected)
    assert batching(model).batches == 1, str(batching(model))


def test_sizes_have_graphs_of_their_own_and_those_used_last_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batching_module, "_KEPT", 2)
    model = slimformer.patch(tiny_model("bert"))
    for lengths in ((8, 8), (40, 8), (70, 8)):
        for _ in range(3):
            called(model, batch(*lengths))
    assert (batching(model).captured, len(batching(model).graphs)) == (3, 2)
    called(model, batch(33, 50))
    assert batching(model).batches == 4, str(batching(model))
    # More sizes in turn than are kept would make a graph in every call.
    called(model, batch(8, 8))
    assert batching(model).captured == 3, str(batching(model))


def test_a_size_whose_graph_was_given_up_gets_another_where_it_comes_often(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(batching_module, "_KEPT", 1)
    monkeypatch.setattr(batching_module, "_CAPTURED_AGAIN_FROM", 4)
    model = slimformer.patch(tiny_model("bert"))
    captured = []
    for lengths in [(8, 8)] * 2 + [(40, 8)] * 2 + [(8, 8)] * 4:
        called(model, batch(*lengths))
        captured.append(batching(model).captured)
    assert captured == [0, 1, 1, 2, 2, 2, 2, 3]


def test_a_batch_that_keeps_the_gpu_busy_is_launched(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batching_module, "KERNELS_FROM_ELEMENTS", 32 * 32 * 4)
    model = slimformer.patch(tiny_model("bert"))
    for _ in range(3):
        called(model, ALIKE[0])
    assert "keeps the GPU busy" in slimformer.status(model).generation["batches"]
    assert batching(model).captured == 0


def hooked(model: Any) -> dict[str, Any]:
    model.encoder.layer[1].register_forward_hook(lambda *_: None)
    return {}


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda _: {"output_hidden_states": True}, "called with output_hidden_states"),
        (lambda _: {"position_ids": torch.arange(31)[None]}, "called with position_ids"),
        (lambda _: {"return_dict": False}, "return a tuple"),
        (lambda _: {"attention_mask": torch.zeros(3, 1, 31, 31)}, "its attention_mask is not"),
        (lambda _: {"attention_mask": torch.ones(3, 31)}, "its attention_mask is not"),
        (hooked, "touched its modules"),
    ],
    ids=["hidden states", "positions", "tuple", "mask of its own", "mask of numbers", "hook"],
)  # fmt: skip
def test_what_is_no_plain_batch_is_launched(change: Callable[[Any], dict[str, Any]], why: str) -> None:
    model = slimformer.patch(tiny_model("bert"))
    for given in ALIKE[:3]:
        called(model, given)
    replayed = batching(model).batches
    given = {**ALIKE[0], **change(model)}
    found = called(model, given)
    assert why in slimformer.status(model).generation["batches"]
    assert batching(model).batches == replayed == 1
    expected = called(slimformer.unpatch(model), given)
    assert near(found[0][ALIKE[0]["attention_mask"].bool()], expected[0][ALIKE[0]["attention_mask"].bool()])


def test_gradients_and_autocast_are_the_models_own() -> None:
    model = slimformer.patch(tiny_model("bert"))
    for given in ALIKE[:2]:
        called(model, given)
    model(**ALIKE[0]).last_hidden_state.sum().backward()
    assert model.embeddings.word_embeddings.weight.grad is not None
    assert "trained" in str(batching(model))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        model(**ALIKE[0])
    assert "autocast" in str(batching(model))
    assert batching(model).batches == 0


def test_inside_and_outside_of_inference_mode() -> None:
    model = tiny_model("bert")
    expected = [states(model, given) for given in ALIKE]
    slimformer.patch(model)
    with torch.inference_mode():
        for given in ALIKE[:3]:
            model(**given)
    assert near(states(model, ALIKE[3]), expected[3])
    with torch.inference_mode():
        assert near(states(model, ALIKE[0]), expected[0])
    assert batching(model).batches == 3, str(batching(model))


def test_new_weights_count_however_they_come() -> None:
    model, other = tiny_model("bert"), tiny_model("bert")
    with torch.no_grad():
        for weight in other.parameters():
            weight.mul_(1.1)
    expected = [states(other, given) for given in ALIKE]
    slimformer.patch(model)
    for given in ALIKE:
        called(model, given)
    model.load_state_dict(other.state_dict())
    assert near(states(model, ALIKE[0]), expected[0])
    model.load_state_dict({name: value.clone() for name, value in other.state_dict().items()}, assign=True)
    for given, right in zip(ALIKE, expected, strict=True):
        assert near(states(model, given), right)
    assert batching(model).captured == 2, str(batching(model))


def test_unpatched_it_is_as_it_was_and_the_memory_is_back() -> None:
    model = tiny_model("bert")
    before, expected = set(vars(model)), called(model, ALIKE[0])
    slimformer.patch(model)
    for given in ALIKE:
        called(model, given)
    report = batching(model)
    assert report.graphs
    slimformer.unpatch(model)
    assert not report.graphs
    assert set(vars(model)) == before
    assert torch.equal(called(model, ALIKE[0]).last_hidden_state, expected.last_hidden_state)


def test_a_copy_has_graphs_of_its_own() -> None:
    model = slimformer.patch(tiny_model("bert"))
    for given in ALIKE:
        called(model, given)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for weight in twin.parameters():
            weight.mul_(1.1)
    for given in ALIKE:
        assert not near(states(twin, given), states(model, given))
    assert batching(twin).captured == 2
    assert batching(twin).graphs.keys() == batching(model).graphs.keys()
    assert batching(twin).graphs is not batching(model).graphs


def test_threads_that_call_it_at_once_get_their_own_texts() -> None:
    model = tiny_model("bert")
    expected = [states(model, given) for given in ALIKE]
    slimformer.patch(model)
    wrong = []

    def calls(number: int) -> None:
        for turn in range(12):
            index = (number + turn) % len(ALIKE)
            if not near(states(model, ALIKE[index]), expected[index]):
                wrong.append((number, turn))

    threads = [threading.Thread(target=calls, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_a_batch_that_cannot_be_captured_is_launched(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("bert")
    expected = [states(model, given) for given in ALIKE]

    def fails() -> None:
        raise ZeroDivisionError("a kernel that does not compile")

    monkeypatch.setattr(batching_module, "preparing_a_batch", fails)
    slimformer.patch(model)
    for given, right in zip(ALIKE, expected, strict=True):
        assert near(states(model, given), right)
    assert "cannot be captured (a kernel that" in slimformer.status(model).generation["batches"]
    assert not batching(model).graphs


def test_a_wrong_replay_is_never_used(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("bert")
    expected = [states(model, given) for given in ALIKE]
    monkeypatch.setattr(batching_module, "capture", lambda call, *_: (lambda: None, call() * 1.01))
    slimformer.patch(model)
    for given, right in zip(ALIKE, expected, strict=True):
        assert near(states(model, given), right)
    assert "gives something else" in slimformer.status(model).generation["batches"]


def test_a_pipeline_embeds_from_graphs_what_it_embeds_alone(tmp_path: Path) -> None:
    embedder = pipeline(tmp_path)
    servers = [TEXTS[start : start + 4] for start in range(0, 24, 4)]
    expected = [embedder.encode(texts) for texts in servers]
    slimformer.patch(embedder)
    for _ in range(2):
        for texts, right in zip(servers, expected, strict=True):
            assert near(torch.from_numpy(embedder.encode(texts)), torch.from_numpy(right))
    report = batching(embedder)
    assert report.batches > 0, str(report)
    slimformer.unpatch(embedder)
    assert not report.graphs


def test_a_compiled_model_has_graphs_of_the_compilers() -> None:
    model = slimformer.patch(tiny_model("bert"))
    expected = states(model, ALIKE[0])
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    for _ in range(3):
        assert near(states(compiled, ALIKE[0]), expected)
    assert batching(model).captured == 0
