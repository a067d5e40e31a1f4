"""Row selectors: what they are asked and may answer, which choices are refused, and what rows are."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

import slimformer
from slimformer import LayerDrop
from slimformer.decisions.policy import Decision
from slimformer.decisions.selection import intersection
from slimformer.errors import PlanError
from slimformer.methods.elimination.random_keep import RandomKeep, chances
from slimformer.model.anatomy import Anatomy
from slimformer.model.layer_parts import KINDS, Kind
from slimformer.rows.rows import Rows
from slimformer.rows.stream import Stream
from slow_rows import LAYOUTS, batch, error, one_thread, outputs, slowly, small  # noqa: F401

# Rounding of float32; a wrong row or key is off by more than a tenth.
CLOSE = 1e-5


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

    def decisions(self, anatomy: Anatomy) -> dict[tuple[int, Kind], Decision]:
        return {self.place: Decision(rows=(self.choose,))}


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
