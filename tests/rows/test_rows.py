"""Sublayers that compute chosen tokens give what computing all and keeping the chosen ones gives."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from transformers import DynamicCache, StaticCache

import slimformer
from slimformer import LayerDrop
from slimformer.errors import PlanError
from slimformer.methods.elimination.random_keep import RandomKeep
from slimformer.model.anatomy import find_anatomy
from slimformer.model.layer_parts import KINDS, Kind
from slow_rows import (  # noqa: F401
    LAYOUTS,
    arguments,
    batch,
    both,
    error,
    graded,
    kept,
    linears,
    nothing,
    one_thread,
    outputs,
    positions,
    rows_through,
    slowly,
    small,
)
from tiny_models import DECODERS, ENCODERS

ALL = [*DECODERS, *ENCODERS]
# Rounding of float32; a wrong row or key is off by more than a tenth.
CLOSE = 1e-5


@pytest.mark.full(1)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ALL)
def test_keeping_every_token_equals_the_dense_model(name: str, layout: str) -> None:
    model, given = small(name), batch(name, layout)
    dense = outputs(model, given)
    slimformer.patch(model, RandomKeep(1.0))
    assert error(outputs(model, given), dense, given["attention_mask"]) <= CLOSE


@pytest.mark.full(1)
@pytest.mark.parametrize("kinds", [("mlp",), ("attention",), ("attention", "mlp")], ids="+".join)
@pytest.mark.parametrize("name", ALL)
def test_a_choice_equals_all_tokens_of_which_the_chosen_count(name: str, kinds: tuple[Kind, ...]) -> None:
    model, method = small(name), RandomKeep(0.5, kinds=kinds, seed=3)
    for layout in LAYOUTS:
        given = batch(name, layout)
        mask = given["attention_mask"]
        with slowly(model, kept(method, positions(mask))):
            expected = outputs(model, given)
        with slimformer.patched(model, method):
            actual = outputs(model, given)
        assert error(actual, expected, mask) <= CLOSE
        assert error(actual, outputs(model, given), mask) > 0.1


@pytest.mark.full(1)
@pytest.mark.parametrize("kinds", [("mlp",), ("attention",), ("attention", "mlp")], ids="+".join)
@pytest.mark.parametrize("name", ALL)
def test_equal_counts_are_the_tokens_with_the_best_chances(name: str, kinds: tuple[Kind, ...]) -> None:
    model, given = small(name), batch(name, "none")
    method = RandomKeep(0.4, kinds=kinds, counts="equal", seed=4)
    masks = kept(method, positions(given["attention_mask"]))
    assert all((mask.sum(1) == round(0.4 * mask.shape[1])).all() for mask in masks.values())
    with slowly(model, masks):
        expected = outputs(model, given)
    slimformer.patch(model, method)
    assert error(outputs(model, given), expected) <= CLOSE


# So few rows, or so many of all, that all are computed; one row; and rows of one token.
@pytest.mark.full(1)
@pytest.mark.parametrize(("keep", "texts", "tokens"), [
    (0.97, LAYOUTS["left"], 24), (0.5, [(1, 4), (0, 5)], 5), (0.5, [(0, 20)], 20), (0.5, [(0, 1)] * 20, 1),
    (0.02, LAYOUTS["left"], 24), (0.5, [(3, 1), (2, 2)], 4),
], ids=["nearly-all", "few", "one-text", "one-token", "hardly-any", "short-texts"])  # fmt: skip
@pytest.mark.parametrize("name", ALL)
def test_any_number_of_rows_may_be_chosen(
    name: str, keep: float, texts: list[tuple[int, int]], tokens: int
) -> None:
    model, given, method = small(name), arguments(name, texts, tokens), RandomKeep(keep, seed=6)
    mask = given["attention_mask"]
    with slowly(model, kept(method, positions(mask))):
        expected = outputs(model, given)
    slimformer.patch(model, method)
    assert error(outputs(model, given), expected, mask) <= CLOSE


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["llama", "phi", "bert", "mpnet", "distilbert"])
def test_rows_that_are_not_chosen_are_not_computed(name: str, kind: Kind) -> None:
    model, given, method = small(name), batch(name, "left"), RandomKeep(0.5, seed=3)
    mask = given["attention_mask"].bool()
    masks = kept(method, positions(mask))
    slimformer.patch(model, method)
    with rows_through(*linears(model, name, kind)) as rows:
        outputs(model, given)
    assert rows == [int((masks[index, kind] & mask).sum()) for index in range(4)]


@pytest.mark.parametrize("name", ["llama", "modernbert"])
def test_equal_counts_compute_that_many_rows(name: str) -> None:
    model = slimformer.patch(small(name), RandomKeep(0.4, counts="equal"))
    with rows_through(*linears(model, name, "mlp")) as rows:
        outputs(model, batch(name, "none"))
    assert rows == [3 * round(0.4 * 24)] * 4


def test_only_the_named_layers_choose() -> None:
    model, given = small("llama"), batch("llama", "left")
    mask, method = given["attention_mask"], RandomKeep(0.5, layers=[1, 3], kinds=["mlp"])
    masks = kept(method, positions(mask))
    assert set(masks) == {(1, "mlp"), (3, "mlp")}
    with slowly(model, masks):
        expected = outputs(model, given)
    slimformer.patch(model, method)
    assert error(outputs(model, given), expected, mask) <= CLOSE


@pytest.mark.full(1)
@pytest.mark.parametrize("kinds", [("attention",), ("attention", "mlp")], ids="+".join)
@pytest.mark.parametrize("name", [
    "llama", "qwen2", "qwen3", "olmo2", "phi3", "phi", "gpt2", "gpt_neox", "bert", "roberta", "mpnet",
    "distilbert",
])  # fmt: skip
def test_compact_keys_are_those_of_the_chosen_tokens(name: str, kinds: tuple[Kind, ...]) -> None:
    model, more = small(name), {"use_cache": False} if name in DECODERS else {}
    for counts, layouts in (("ragged", LAYOUTS), ("equal", ["none"])):
        method = RandomKeep(0.5, kinds=kinds, counts=counts, keys="compact", seed=2)
        for layout in layouts:
            given = batch(name, layout)
            mask = given["attention_mask"]
            masks = kept(method, positions(mask))
            with slowly(model, masks, compact=mask):
                expected = outputs(model, given, **more)
            with slowly(model, masks):
                dense_keys = outputs(model, given, **more)
            with slimformer.patched(model, method):
                actual = outputs(model, given, **more)
            assert error(actual, expected, mask) <= CLOSE
            assert error(actual, dense_keys, mask) > 0.05


def test_compact_keys_know_no_cache_and_no_sliding_window() -> None:
    method = RandomKeep(0.5, keys="compact")
    for layout in LAYOUTS:
        llama, gemma = slimformer.patch(small("llama"), method), slimformer.patch(small("gemma2"), method)
        with pytest.raises(PlanError, match="use_cache=False"):
            outputs(llama, batch("llama", layout), use_cache=True)
        with pytest.raises(PlanError, match="sliding window"):
            outputs(gemma, batch("gemma2", layout), use_cache=False)


def steps(model: nn.Module, given: dict[str, Tensor], cache: object, length: int | None = None) -> Tensor:
    """Logits of a prompt, two single tokens, and the rest at once; a static cache has `length` slots."""
    found, mask = [], given["attention_mask"]
    for begin, end in [(0, 14), (14, 15), (15, 16), (16, mask.shape[1])]:
        part = {name: value[:, begin:end] for name, value in given.items()}
        # The mask of a static cache names only tokens seen so far.
        seen = torch.nn.functional.pad(mask[:, :end], (0, max((length or end) - end, 0)))
        found.append(outputs(model, {**part, "attention_mask": seen}, past_key_values=cache, use_cache=True))
    return torch.cat(found, 1)


# So many texts that tokens are chosen in decode steps too.
CACHED = [(5, 19), (0, 24), (11, 13)] * 6


@pytest.mark.full(1)
@pytest.mark.parametrize("keep", [0.5, 0.97])
@pytest.mark.parametrize("name", DECODERS)
def test_cached_steps_equal_one_uncached_pass(name: str, keep: float) -> None:
    model, given = small(name), arguments(name, CACHED)
    slimformer.patch(model, RandomKeep(keep, seed=1))
    whole = outputs(model, given, use_cache=False)
    actual = steps(model, given, DynamicCache(config=model.config))
    assert error(actual, whole, given["attention_mask"]) <= CLOSE


@pytest.mark.parametrize("name", DECODERS)
def test_steps_in_a_static_cache_equal_one_uncached_pass(name: str) -> None:
    model, given = small(name), arguments(name, CACHED)
    slimformer.patch(model, RandomKeep(0.5, seed=1))
    whole = outputs(model, given, use_cache=False)
    actual = steps(model, given, StaticCache(model.config, max_cache_len=32), 32)
    assert error(actual, whole, given["attention_mask"]) <= CLOSE


def test_layers_without_position_ids_count_the_tokens_in_the_cache() -> None:
    model = small("bert", is_decoder=True)
    given = arguments("bert", CACHED)
    slimformer.patch(model, RandomKeep(0.5, seed=1))
    whole = outputs(model, given, use_cache=False)
    actual = steps(model, given, DynamicCache(config=model.config))
    assert error(actual, whole, given["attention_mask"]) <= CLOSE


@pytest.mark.parametrize("name", ALL)
def test_a_text_meets_the_same_sublayers_whatever_is_in_its_batch(name: str) -> None:
    model = slimformer.patch(small(name), RandomKeep(0.5, seed=8))
    together = batch(name, "left" if name in DECODERS else "right")
    found = outputs(model, together)
    for row, mask in enumerate(together["attention_mask"].bool()):
        alone = {key: value[row : row + 1, mask] for key, value in together.items()}
        assert error(found[row][mask], outputs(model, alone)[0]) <= CLOSE


@pytest.mark.parametrize("name", ["llama", "qwen3", "phi3", "gpt_neox"])
def test_packed_texts_meet_the_same_sublayers_as_alone(name: str) -> None:
    model = slimformer.patch(small(name), RandomKeep(0.5, seed=8))
    tokens = arguments(name, [(0, 24)])["input_ids"]
    places = torch.cat([torch.arange(9), torch.arange(15)])[None]
    packed = outputs(model, {"input_ids": tokens, "position_ids": places}, use_cache=False)
    for begin, end in [(0, 9), (9, 24)]:
        alone = outputs(model, {"input_ids": tokens[:, begin:end]}, use_cache=False)
        assert error(packed[:, begin:end], alone) <= CLOSE


@pytest.mark.parametrize("name", ALL)
def test_tokens_are_computed_that_every_method_keeps(name: str) -> None:
    model, given = small(name), batch(name, "left" if name in DECODERS else "right")
    mask = given["attention_mask"]
    first, second = RandomKeep(0.6, seed=1), RandomKeep(0.6, layers=[0, 1, 2], seed=2)
    drop, places = LayerDrop(attention=[1], mlp=[2]), positions(mask)
    intersected = both(kept(first, places), kept(second, places))
    for methods, keep in (
        ((first, second), intersected),
        ((first, drop, second), both(intersected, nothing(drop, places))),
    ):
        with slowly(model, keep):
            expected = outputs(model, given)
        with slimformer.patched(model, *methods):
            actual = outputs(model, given)
        assert error(actual, expected, mask) <= CLOSE


def replaced(model: nn.Module, replace: str) -> LayerDrop:
    """Random replacements of two attentions and an MLP, as large as what they replace."""
    hidden, generator = find_anatomy(model).stack.config.hidden_size, torch.Generator().manual_seed(7)
    weights = {}
    for name, taps in (("attention.1", 3), ("attention.3", 3), ("mlp.2", 1)):
        weights[f"{name}.bias"] = torch.randn(hidden, generator=generator) * 0.3
        weights[f"{name}.weight"] = torch.randn(hidden, taps * hidden, generator=generator) * 0.2
    return LayerDrop(attention=[1, 3], mlp=[2], replace=replace, taps=3, weights=weights)


@pytest.mark.full(1)
@pytest.mark.parametrize("replace", ["mean", "filter"])
@pytest.mark.parametrize("name", ALL)
def test_what_stands_in_for_a_sublayer_does_not_see_that_padding_left(name: str, replace: str) -> None:
    model = small(name)
    together = batch(name, "left" if name in DECODERS else "right")
    slimformer.patch(model, RandomKeep(0.5, seed=8), replaced(model, replace))
    found = outputs(model, together)
    for row, mask in enumerate(together["attention_mask"].bool()):
        alone = {key: value[row : row + 1, mask] for key, value in together.items()}
        assert error(found[row][mask], outputs(model, alone)[0]) <= CLOSE


@pytest.mark.full(1)
@pytest.mark.parametrize("replace", ["mean", "filter"])
@pytest.mark.parametrize("name", DECODERS)
def test_cached_steps_beside_replacements_equal_one_uncached_pass(name: str, replace: str) -> None:
    model, given = small(name), arguments(name, CACHED)
    slimformer.patch(model, RandomKeep(0.5, seed=1), replaced(model, replace))
    whole = outputs(model, given, use_cache=False)
    actual = steps(model, given, DynamicCache(config=model.config))
    assert error(actual, whole, given["attention_mask"]) <= CLOSE


def after(prompt: dict[str, Tensor], sequences: Tensor, model: nn.Module) -> Tensor:
    """The logits `[sequences, new, vocabulary]` of what was generated behind a prompt, in one uncached pass."""
    mask, times = prompt["attention_mask"], sequences.shape[0] // prompt["attention_mask"].shape[0]
    new = sequences.shape[1] - mask.shape[1]
    mask = torch.nn.functional.pad(mask.repeat_interleave(times, 0), (0, new), value=1)
    given = {"input_ids": sequences, "attention_mask": mask, "position_ids": positions(mask)}
    return outputs(model, given, use_cache=False)[:, -new - 1 : -1]


@pytest.mark.parametrize("name", DECODERS)
def test_generate_decodes_with_the_logits_of_an_uncached_pass(name: str) -> None:
    model = slimformer.patch(small(name), RandomKeep(0.5, seed=1))
    prompt = {k: v for k, v in batch(name, "left").items() if k != "position_ids"}
    made = model.generate(**prompt, do_sample=False, min_new_tokens=5, max_new_tokens=5, output_logits=True,
                          return_dict_in_generate=True)  # fmt: skip
    assert error(torch.stack(made.logits, 1), after(prompt, made.sequences, model)) <= CLOSE


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2", "phi"])
def test_beams_score_what_an_uncached_pass_says(name: str) -> None:
    model = slimformer.patch(small(name), RandomKeep(0.5, seed=1))
    prompt = {k: v for k, v in batch(name, "left").items() if k != "position_ids"}
    made = model.generate(**prompt, num_beams=3, num_return_sequences=3, do_sample=False, min_new_tokens=5,
                          max_new_tokens=5, length_penalty=0.0, output_scores=True,
                          return_dict_in_generate=True)  # fmt: skip
    of_token = after(prompt, made.sequences, model).log_softmax(-1)
    chosen = of_token.gather(2, made.sequences[:, -5:, None]).sum((1, 2))
    torch.testing.assert_close(made.sequences_scores, chosen, atol=1e-4, rtol=1e-5)


def gradients(model: nn.Module, given: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    """The output, and the gradient of a sum over it for every parameter that has one."""
    model.zero_grad(set_to_none=True)
    out, mask = graded(model, given), given["attention_mask"].bool()
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(2))
    (out * weights)[mask].sum().backward()
    return out.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.full(1)
@pytest.mark.parametrize("layout", ["none", "left"])
@pytest.mark.parametrize("name", ALL)
def test_gradients_are_those_of_the_slow_way(name: str, layout: str) -> None:
    model, given, method = small(name), batch(name, layout), RandomKeep(0.5, seed=3)
    mask = given["attention_mask"]
    with slowly(model, kept(method, positions(mask))):
        expected, slow = gradients(model, given)
    slimformer.patch(model, method)
    actual, found = gradients(model, given)
    assert error(actual, expected, mask) <= CLOSE
    assert error(outputs(model, given), actual, mask) <= CLOSE
    assert set(found) == set(slow)
    largest = max(gradient.norm() for gradient in slow.values())
    for parameter, gradient in slow.items():
        assert torch.isfinite(found[parameter]).all(), parameter
        # A key's bias has no gradient but rounding.
        assert (found[parameter] - gradient).norm() <= 1e-5 * gradient.norm() + 1e-6 * largest, parameter


@pytest.mark.full(1)
@pytest.mark.parametrize(("counts", "layout"), [
    ("equal", "no-mask"), ("equal", "none"), ("ragged", "left"),
])  # fmt: skip
@pytest.mark.parametrize("name", ["llama", "bert"])
def test_compiles_without_graph_breaks(name: str, counts: str, layout: str) -> None:
    torch.compiler.reset()
    model = small(name, num_hidden_layers=2)
    given = batch(name, "none" if layout == "no-mask" else layout)
    mask = given["attention_mask"]
    if layout == "no-mask":
        del given["attention_mask"]
    slimformer.patch(model, RandomKeep(0.5, counts=counts))
    expected = outputs(model, given)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    assert error(outputs(compiled, given), expected, mask) <= CLOSE


def test_a_compiled_pass_that_fails_leaves_later_ones_nothing_of_its_text() -> None:
    torch.compiler.reset()
    # Whose layers are not told where tokens stand, so that it is the stack's call that says it.
    model = small("bert", num_hidden_layers=2)
    ids = batch("bert", "none")["input_ids"]
    slimformer.patch(model, RandomKeep(0.5, seed=3))

    def fail(*given: object) -> None:
        torch._dynamo.graph_break()
        raise RuntimeError("inside")

    hook = model.pooler.register_forward_pre_hook(fail)
    elsewhere = torch.arange(ids.shape[1], device=ids.device).flip(0)[None]
    with pytest.raises(RuntimeError, match="inside"):
        torch.compile(model, backend="eager")(input_ids=ids, position_ids=elsewhere)
    hook.remove()
    expected = model(input_ids=ids).last_hidden_state
    for layer in model.encoder.layer:
        layer.compile(backend="eager")
    assert torch.allclose(model(input_ids=ids).last_hidden_state, expected, atol=1e-6)


def attributes(model: nn.Module) -> list[tuple[str, list[str]]]:
    return [(name, sorted(vars(module))) for name, module in model.named_modules()]


@pytest.mark.parametrize("name", ALL)
def test_unpatch_restores_everything(name: str) -> None:
    model, given = small(name), batch(name, "left" if name in DECODERS else "right")
    before, keys, state = outputs(model, given), attributes(model), list(model.state_dict())

    def fail_inside() -> None:
        with slimformer.patched(model, RandomKeep(0.5), LayerDrop(mlp=[1])):
            assert list(model.state_dict()) == state
            assert not torch.equal(outputs(model, given), before)
            raise RuntimeError("inside")

    for _ in range(2):
        with pytest.raises(RuntimeError, match="inside"):
            fail_inside()
        assert torch.equal(outputs(model, given), before)
        assert attributes(model) == keys
        assert list(model.state_dict()) == state
        assert slimformer.status(model) == {}
