"""A patch without a method computes no padding and changes nothing at real tokens, in any way a model is called."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

import slimformer
from slimformer import TempScale
from slimformer.methods.temperature import LogNScale
from slimformer.model.anatomy import find_anatomy
from slimformer.model.layer_parts import KINDS, Kind
from slow_rows import (  # noqa: F401
    LAYOUTS,
    LINEARS,
    arguments,
    batch,
    error,
    graded,
    linears,
    one_thread,
    outputs,
    rows_through,
    slowly,
    small,
)
from tiny_models import DECODERS, ENCODERS, tiny_model

ALL = [*DECODERS, *ENCODERS]
CLOSE = 1e-5
# Rows without any text, of one token, and a batch of hardly any.
ODD = {
    "empty-row": [(5, 19), (0, 0), (20, 4)], "one-real-token": [(23, 1), (0, 0), (0, 0)],
    "two-real-tokens": [(23, 1), (0, 0), (4, 1)], "one-text": [(9, 15)],
}  # fmt: skip
NO_DROPOUT = dict.fromkeys(
    ("attention_dropout", "attention_probs_dropout_prob", "attn_pdrop", "dropout", "embd_pdrop",
     "embedding_dropout", "hidden_dropout", "hidden_dropout_prob", "mlp_dropout", "resid_pdrop"), 0.0
)  # fmt: skip


@pytest.mark.parametrize("layout", [*LAYOUTS, *ODD])
@pytest.mark.parametrize("name", ALL)
def test_padding_changes_nothing_at_real_tokens(name: str, layout: str) -> None:
    model, given = small(name), arguments(name, {**LAYOUTS, **ODD}[layout])
    mask = given["attention_mask"]
    calls = [given]
    if name in DECODERS:
        calls.append({key: value for key, value in given.items() if key != "position_ids"})
    for call in calls:
        expected = outputs(model, call)
        with slimformer.patched(model):
            assert error(outputs(model, call), expected, mask) <= CLOSE


@pytest.mark.parametrize("texts", [[(0, 24)] * 3, [(0, 1)] * 3, [(0, 1)]], ids=["texts", "tokens", "token"])
@pytest.mark.parametrize("name", ALL)
def test_without_padding_nothing_changes_at_all(name: str, texts: list[tuple[int, int]]) -> None:
    model, given = small(name), arguments(name, texts, tokens=texts[0][1])
    without_mask = {"input_ids": given["input_ids"]}
    for call in (given, without_mask):
        expected = outputs(model, call)
        with slimformer.patched(model):
            assert torch.equal(outputs(model, call), expected)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", LINEARS)
def test_only_text_is_computed(name: str, kind: Kind) -> None:
    model = slimformer.patch(small(name))
    for layout in LAYOUTS:
        given = batch(name, layout)
        with rows_through(*linears(model, name, kind)) as rows:
            outputs(model, given)
        assert rows == [int(given["attention_mask"].sum())] * 4


@pytest.mark.parametrize("method", [TempScale(0.6), LogNScale(6)], ids=repr)
@pytest.mark.parametrize("name", ["bert", "mpnet"])
def test_only_text_is_computed_where_scores_are_changed(name: str, method: Any) -> None:
    model, given = slimformer.patch(small(name), method), batch(name, "mixed")
    with rows_through(*linears(model, name, "attention")) as rows:
        actual = outputs(model, given)
    assert rows == [int(given["attention_mask"].sum())] * 4
    for row, (begin, length) in enumerate(LAYOUTS["mixed"]):
        alone = {key: value[row : row + 1, begin : begin + length] for key, value in given.items()}
        if begin == 0:
            assert error(actual[row : row + 1, :length], outputs(model, alone)) <= CLOSE


@pytest.mark.parametrize("name", ["bert", "mpnet"])
def test_a_loop_over_the_layers_may_be_called_by_itself(name: str) -> None:
    model, given = small(name), batch(name, "right")
    x = torch.randn(3, 24, 32, generator=torch.Generator().manual_seed(3))
    hidden = torch.zeros(3, 1, 1, 24).masked_fill(given["attention_mask"][:, None, None] == 0, -1e9)
    with torch.no_grad():
        expected = model.encoder(x, attention_mask=hidden)[0]
        actual = slimformer.patch(model).encoder(x, attention_mask=hidden)[0]
    assert error(actual, expected, given["attention_mask"]) <= CLOSE


@pytest.mark.parametrize("name", ALL)
def test_every_layer_can_be_looked_into(name: str) -> None:
    model, given = small(name, attn_implementation="eager"), batch(name, "left")
    recorded: dict[str, Any] = {"output_hidden_states": True, "output_attentions": True}
    with torch.no_grad():
        expected, last = model(**given, **recorded), outputs(model, given)
        slimformer.patch(model)
        for _ in range(2):
            actual = model(**given, **recorded)
            assert len(actual.hidden_states) == 5
            assert len(actual.attentions) == 4
            for kind in ("hidden_states", "attentions"):
                for found, wanted in zip(getattr(actual, kind), getattr(expected, kind), strict=True):
                    assert error(found, wanted) <= CLOSE
            # And recording leaves nothing behind.
            assert error(outputs(model, given), last, given["attention_mask"]) <= CLOSE


@pytest.mark.parametrize("name", ALL)
def test_hooks_on_layers_see_the_whole_batch(name: str) -> None:
    model, given = small(name), batch(name, "left")
    seen: list[Tensor] = []

    def read(module: nn.Module, args: tuple[Tensor, ...], out: Any) -> None:
        seen.extend((args[0], out[0] if isinstance(out, tuple) else out))

    layer = find_anatomy(model).layers[2]
    handle = layer.register_forward_hook(read)
    expected = outputs(model, given)
    slimformer.patch(model)
    assert error(outputs(model, given), expected) <= CLOSE
    for found, wanted in zip(seen[2:], seen[:2], strict=True):
        assert found.shape == (3, 24, 32)
        assert error(found, wanted) <= CLOSE
    handle.remove()
    assert error(outputs(model, given), expected, given["attention_mask"]) <= CLOSE
    assert len(seen) == 4


@pytest.mark.parametrize("name", ["llama", "bert"])
def test_a_hook_that_changes_the_residual_is_obeyed(name: str) -> None:
    model, given = small(name), batch(name, "left")
    layers = find_anatomy(model).layers
    layers[1].register_forward_pre_hook(lambda module, args: (args[0] * 1.5, *args[1:]))
    expected = outputs(model, given)
    slimformer.patch(model)
    assert error(outputs(model, given), expected, given["attention_mask"]) <= CLOSE


@pytest.mark.parametrize("name", [name for name in DECODERS if name != "gemma2"])
def test_packed_texts_stay_apart(name: str) -> None:
    model, ids = small(name), arguments(name, [(0, 24), (0, 24)])["input_ids"]
    places = torch.cat([torch.arange(9), torch.arange(15)])[None].expand(2, -1)
    given = {"input_ids": ids, "position_ids": places}
    expected = outputs(model, given, use_cache=False)
    alone = outputs(model, {"input_ids": ids[:, 9:]}, use_cache=False)
    assert error(expected[:, 9:], alone) <= CLOSE
    slimformer.patch(model)
    assert error(outputs(model, given, use_cache=False), expected) <= CLOSE


@pytest.mark.parametrize("padded", [False, True], ids=["full", "padded"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt_neox", "bert", "distilbert"])
def test_a_mask_of_the_users_own_is_obeyed(name: str, padded: bool) -> None:
    model, given = small(name), batch(name, "left" if padded else "none")
    mask = given["attention_mask"].bool()
    allowed = mask[:, None, None, :].expand(3, 1, 24, 24).clone()
    if name in DECODERS:
        allowed = allowed.tril()
    plain = outputs(model, {**given, "attention_mask": allowed})
    # Later tokens do not see two in the middle, which see themselves.
    allowed[:, :, 23:, 21:23] = False
    call = {**given, "attention_mask": allowed}
    expected = outputs(model, call)
    assert error(expected, plain, mask) > 1e-3
    slimformer.patch(model)
    assert error(outputs(model, call), expected, mask) <= CLOSE


def prompt(name: str, texts: list[tuple[int, int]]) -> dict[str, Tensor]:
    return {key: value for key, value in arguments(name, texts).items() if key != "position_ids"}


def compare(model: PreTrainedModel, given: dict[str, Tensor], **options: Any) -> None:
    """`generate` before and after the patch: the same text from the same logits."""
    model.generation_config.disable_compile = True
    options = {
        "do_sample": False, "min_new_tokens": 6, "max_new_tokens": 6, "output_logits": True, "output_scores": True,
        "return_dict_in_generate": True, **options,
    }  # fmt: skip
    expected = model.generate(**given, **options)
    slimformer.patch(model)
    actual = model.generate(**given, **options)
    assert torch.equal(actual.sequences, expected.sequences)
    assert len(actual.logits) == len(expected.logits)
    for found, wanted in zip(actual.logits, expected.logits, strict=True):
        assert error(found, wanted) <= CLOSE
    if "num_beams" in options:
        torch.testing.assert_close(actual.sequences_scores, expected.sequences_scores, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", DECODERS)
def test_generate_has_the_same_logits(name: str) -> None:
    compare(small(name), prompt(name, LAYOUTS["left"]))


@pytest.mark.parametrize("options", [
    {"cache_implementation": "static"}, {"num_beams": 3}, {"use_cache": False},
], ids=["static", "beams", "no-cache"])  # fmt: skip
@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2"])
def test_generate_has_the_same_logits_with_other_options(name: str, options: dict[str, Any]) -> None:
    compare(small(name), prompt(name, LAYOUTS["left"]), **options)


@pytest.mark.parametrize("patched", [False, True], ids=["plain", "patched"])
def test_assisted_generation_has_the_same_logits(patched: bool) -> None:
    assistant = tiny_model("llama")
    if patched:
        slimformer.patch(assistant)
    compare(small("llama"), prompt("llama", [(7, 17)]), assistant_model=assistant)


def trained(model: nn.Module, given: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    """A loss over the real tokens, and its gradients."""
    model.zero_grad(set_to_none=True)
    out, mask = graded(model, given), given["attention_mask"].bool()
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(2))
    loss = (out * weights)[mask].square().mean()
    loss.backward()
    return loss.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


# MPNet knows no checkpointing, and its older name is the one that every version has.
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated")
@pytest.mark.parametrize(("name", "mode"), [
    *((name, mode) for name in ALL for mode in ("train", "eval")),
    *((name, "checkpointing") for name in ("llama", "gemma2", "gpt2", "bert", "modernbert")),
])  # fmt: skip
def test_training_goes_on_as_before(name: str, mode: str) -> None:
    model, given = small(name, **NO_DROPOUT), batch(name, "left" if name in DECODERS else "right")
    model.train(mode != "eval")
    if mode == "checkpointing":
        model.gradient_checkpointing_enable({"use_reentrant": False})
    expected, slow = trained(model, given)
    slimformer.patch(model)
    actual, found = trained(model, given)
    torch.testing.assert_close(actual, expected, atol=0, rtol=1e-5)
    assert set(found) == set(slow)
    assert sum(bool(gradient.norm() > 0) for gradient in found.values()) > len(found) / 2
    for parameter, gradient in slow.items():
        torch.testing.assert_close(found[parameter], gradient, atol=1e-6, rtol=1e-5, msg=parameter)


@pytest.mark.parametrize("name", ALL)
def test_forward_may_be_called_by_itself(name: str) -> None:
    model, given = small(name), batch(name, "right")
    with torch.no_grad():
        expected = model.forward(**given)[0]
        slimformer.patch(model)
        assert error(model.forward(**given)[0], expected, given["attention_mask"]) <= CLOSE


@pytest.mark.parametrize("name", ALL)
def test_copies_live_on_their_own(name: str) -> None:
    model, given = slimformer.patch(small(name)), batch(name, "left")
    expected = outputs(model, given)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for weight in model.parameters():
            weight.zero_()
    assert torch.equal(outputs(twin, given), expected)
    assert slimformer.status(twin) == slimformer.status(model) != {}
    slimformer.unpatch(twin)
    assert slimformer.status(model) != {}
    assert error(outputs(twin, given), expected, given["attention_mask"]) <= CLOSE


@pytest.mark.parametrize("name", ALL)
def test_bfloat16_stays_what_it_was(name: str) -> None:
    given = batch(name, "left")
    mask = given["attention_mask"]
    # With the weights of `small`, rounding alone moves the output by more than this.
    model = tiny_model(name).to(torch.bfloat16)
    expected = outputs(model, given)
    actual = outputs(slimformer.patch(model), given)
    assert actual.dtype == torch.bfloat16
    assert error(actual, expected, mask) <= 1e-2
    model = small(name)
    exact = outputs(model, given)
    rounded = outputs(model.to(torch.bfloat16), given)
    actual = outputs(slimformer.patch(model), given)
    assert error(actual, exact, mask) <= 1.2 * error(rounded, exact, mask)


@pytest.mark.parametrize("name", ALL)
def test_status_says_that_text_is_computed(name: str) -> None:
    model = slimformer.patch(small(name))
    assert slimformer.status(model) == {index: dict.fromkeys(KINDS, "text rows") for index in range(4)}


@pytest.mark.parametrize("name", ["llama", "gpt_neox", "bert", "modernbert"])
def test_padding_comes_out_as_it_went_in(name: str) -> None:
    """At padding the layers' output is the embedding: nothing that real tokens hold leaks into it."""
    model, given = small(name), batch(name, "left")
    mask = given["attention_mask"].bool()
    with slowly(model, {(index, kind): mask for index in range(4) for kind in KINDS}):
        expected = outputs(model, given)
    slimformer.patch(model)
    assert error(outputs(model, given), expected) <= CLOSE
