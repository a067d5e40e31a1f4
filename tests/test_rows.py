"""Sublayers that compute chosen tokens give what computing all and keeping the chosen ones gives."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn
from transformers import DynamicCache, StaticCache

import slimformer
from slimformer import LayerDrop
from slimformer.anatomy import KINDS, Anatomy, Kind, find_anatomy
from slimformer.errors import PlanError
from slimformer.executor import SublayerPlan
from slimformer.methods.random_keep import RandomKeep, chances
from slimformer.rows import Rows, intersection
from slimformer.stream import Stream
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


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ALL)
def test_keeping_every_token_equals_the_dense_model(name: str, layout: str) -> None:
    model, given = small(name), batch(name, layout)
    dense = outputs(model, given)
    slimformer.patch(model, RandomKeep(1.0))
    assert error(outputs(model, given), dense, given["attention_mask"]) <= CLOSE


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
@pytest.mark.parametrize("name", ["llama", "phi", "bert", "distilbert"])
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


@pytest.mark.parametrize("kinds", [("attention",), ("attention", "mlp")], ids="+".join)
@pytest.mark.parametrize("name", [
    "llama", "qwen2", "qwen3", "olmo2", "phi3", "phi", "gpt2", "gpt_neox", "bert", "roberta", "distilbert",
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


@pytest.mark.parametrize("keep", [0, -1, 1.5, True, "x", None, float("nan")])
def test_a_fraction_that_is_none_is_refused(keep: object) -> None:
    with pytest.raises(PlanError, match="above 0 and up to 1, got"):
        RandomKeep(keep)


@pytest.mark.parametrize(("arguments", "message"), [
    ({"counts": "some"}, "ragged, equal, got 'some'"), ({"keys": "few"}, "dense, compact, got 'few'"),
    ({"kinds": ["mlp", "norm"]}, "attention, mlp, got"), ({"kinds": []}, "attention, mlp, got"),
])  # fmt: skip
def test_unknown_choices_are_refused(arguments: dict, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        RandomKeep(0.5, **arguments)


@pytest.mark.parametrize("layer", [4, -1, True, "1"])
def test_layers_that_the_model_does_not_have_are_refused(layer: object) -> None:
    model = small("llama")
    with pytest.raises(PlanError, match="allowed are 0 to 3"):
        slimformer.patch(model, RandomKeep(0.5, layers=[0, layer]))
    assert slimformer.status(model) == {}


@pytest.mark.parametrize("name", ["llama", "gpt_neox", "bert", "modernbert"])
def test_equal_counts_are_refused_where_padding_leaves(name: str) -> None:
    model, given = slimformer.patch(small(name), RandomKeep(0.5, counts="equal")), batch(name, "left")
    with pytest.raises(PlanError, match="counts='ragged'"):
        outputs(model, given)
    # The refusal is about the batch, and the model goes on.
    assert torch.isfinite(outputs(model, batch(name, "none"))).all()


@dataclass
class Chosen:
    """A method whose one row selector is given."""

    choose: Callable[[Stream, Tensor], Rows | None]
    place: tuple[int, Kind] = (1, "mlp")

    def sublayer_plans(self, anatomy: Anatomy) -> dict[tuple[int, Kind], SublayerPlan]:
        return {self.place: SublayerPlan(rows=(self.choose,))}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_selector_that_answers_for_other_rows_is_refused(layout: str) -> None:
    model = slimformer.patch(small("llama"), Chosen(lambda stream, x: Rows(7, given_index=torch.arange(3))))
    rows = sum(length for _, length in LAYOUTS[layout])
    with pytest.raises(PlanError, match=f"answered for 7 rows, and the stream has {rows}"):
        outputs(model, batch("llama", layout))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["llama", "gpt_neox", "bert", "modernbert"])
def test_a_selector_sees_the_residual_of_its_sublayer(name: str, kind: Kind) -> None:
    """A method of one's own, which chooses tokens by what is in the residual."""
    model, given, seen = small(name), batch(name, "none"), []

    def choose(stream: Stream, x: Tensor) -> Rows:
        seen.append(x.clone())
        return Rows(x.shape[0], given_mask=x[:, 0] > 0)

    with slimformer.patched(model, Chosen(choose, (2, kind))):
        actual = outputs(model, given)
    (x,) = seen
    with slowly(model, {(2, kind): (x[:, 0] > 0).view(3, 24)}):
        expected = outputs(model, given)
    assert error(actual, expected) <= CLOSE


def test_status_says_which_rows_are_computed() -> None:
    model = small("llama")
    slimformer.patch(model, RandomKeep(0.5, layers=[1, 2], kinds=["mlp"]), LayerDrop(attention=[3], mlp=[2]))
    assert slimformer.status(model) == {
        0: {"attention": "text rows", "mlp": "text rows"},
        1: {"attention": "text rows", "mlp": "chosen rows"},
        2: {"attention": "text rows", "mlp": "dropped"},
        3: {"attention": "dropped", "mlp": "text rows"},
    }
    assert slimformer.status(slimformer.unpatch(model)) == {}


def test_rows_are_a_mask_or_sorted_indices() -> None:
    mask = torch.tensor([False, True, True, False, True])
    for rows in (Rows(5, given_mask=mask), Rows(5, given_index=torch.tensor([1, 2, 4]))):
        assert rows.index.tolist() == [1, 2, 4]
        assert rows.index.dtype == torch.int64
        assert torch.equal(rows.mask, mask)
    none, everything = Rows(3, given_mask=torch.zeros(3, dtype=torch.bool)), Rows(3, torch.arange(3))
    assert none.index.tolist() == []
    assert Rows(3, given_index=torch.tensor([], dtype=torch.int64)).mask.tolist() == [False] * 3
    assert everything.mask.all()


def test_the_number_of_rows_is_known_once_there_are_indices() -> None:
    assert Rows(5, given_index=torch.tensor([1, 4])).known_count == 2
    rows = Rows(3, given_mask=torch.tensor([True, False, True]))
    assert rows.known_count is None
    assert len(rows.index) == 2
    assert rows.known_count == 2


def test_rows_intersect() -> None:
    first = Rows(4, given_mask=torch.tensor([True, True, False, True]))
    second = Rows(4, given_index=torch.tensor([0, 2, 3]))
    assert (first & second).index.tolist() == [0, 3]
    assert (second & first).index.tolist() == [0, 3]
    assert (first & first) is first
    assert (first & Rows(4, given_index=torch.tensor([2]))).index.tolist() == []


def test_selectors_that_keep_everything_count_for_nothing() -> None:
    stream, x = Stream(1, 4, True, torch.device("cpu")), torch.zeros(4, 2)
    some = Rows(4, given_index=torch.tensor([0, 2]))
    assert intersection((), stream, x) is None
    assert intersection((lambda s, r: None, lambda s, r: None), stream, x) is None
    assert intersection((lambda s, r: None, lambda s, r: some), stream, x) is some
    found = intersection(
        (lambda s, r: some, lambda s, r: Rows(4, given_index=torch.tensor([1, 2]))), stream, x
    )
    assert found is not None
    assert found.index.tolist() == [2]


def test_chances_are_even_and_independent_of_each_other() -> None:
    places = torch.arange(20000)
    for seed in (0, 1, 7, 1_000_003, 5_000_017):
        chance = chances(places, seed)
        assert 0 <= chance.min() < 0.001
        assert 0.999 < chance.max() < 1
        # Neighbours, and the same token in the next sublayer, say nothing about each other.
        for other in (chance.roll(1), chances(places, seed + 1), chances(places, seed + 1_000_003)):
            together = ((chance < 0.5) & (other < 0.5)).double().mean()
            assert (together - 0.25).abs() < 0.02
    seeds = torch.tensor([[3], [4]])
    assert torch.equal(chances(places, seeds), torch.stack([chances(places, 3), chances(places, 4)]))
