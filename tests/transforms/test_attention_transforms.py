"""Patched models stay what others expect: picklable, copyable, compilable, with the signature that they had."""

from __future__ import annotations

import copy
import inspect
import pickle
import threading
from typing import Any

import pytest
import torch
from torch import Tensor

import slimformer
from slimformer import Plan, SelfExtend, TempScale
from slimformer.decisions.policy import TokenPolicy
from slimformer.errors import PlanError, UnsupportedModelError
from slimformer.methods.absolute_positions import PositionInterpolation
from slimformer.methods.rope_scaling import RopeScaling
from slimformer.methods.temperature import LogNScale
from slimformer.transforms.transform import AttentionTransform
from slow_rows import arguments, error, one_thread, outputs, small  # noqa: F401

CASES: dict[str, tuple[str, list[Any]]] = {
    "temperature": ("llama", [TempScale(0.7)]),
    "log n": ("modernbert", [LogNScale(20), TempScale(0.7)]),
    "own scores": ("mpnet", [LogNScale(20)]),
    "groups": ("llama", [SelfExtend(4, 7, 23)]),
    "angles": ("llama", [RopeScaling("yarn", 4.0, trained_length=20)]),
    "table": ("bert", [PositionInterpolation(4, 20)]),
}
cases = pytest.mark.parametrize("case", CASES)


@cases
def test_copies_compute_the_same_and_are_undone_alone(case: str) -> None:
    name, methods = CASES[case]
    model, given = small(name), arguments(name, [(0, 61), (0, 40)], 61)
    dense = outputs(model, arguments(name, [(0, 20)], 20))
    changed = outputs(slimformer.patch(model, *methods), given)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(outputs(twin, given), changed)
        slimformer.unpatch(twin)
        assert torch.equal(outputs(twin, arguments(name, [(0, 20)], 20)), dense)
    assert torch.equal(outputs(model, given), changed)


@cases
def test_the_signature_of_the_model_stays(case: str) -> None:
    name, methods = CASES[case]
    model = small(name)
    stack = getattr(model, "model", model)
    before = inspect.signature(stack.forward)
    slimformer.patch(model, *methods)
    assert inspect.signature(stack.forward) == before


@cases
def test_compiled_models_compute_the_same(case: str) -> None:
    name, methods = CASES[case]
    model, given = small(name), arguments(name, [(0, 61), (0, 61)], 61)
    given.pop("attention_mask")
    expected = outputs(slimformer.patch(model, *methods), given)
    torch.compiler.reset()
    # A temperature that the module itself heeds leaves the model one graph.
    compiled = torch.compile(model, backend="aot_eager", fullgraph=case == "temperature")
    assert error(outputs(compiled, given), expected) <= 1e-5


def test_texts_of_threads_do_not_mix() -> None:
    model = slimformer.patch(small("llama"), LogNScale(6), SelfExtend(4, 7, 23))
    batches = [arguments("llama", [(0, 61), (20, 41)], 61), arguments("llama", [(40, 21), (3, 58)], 61)]
    expected = [outputs(model, given) for given in batches]
    found: dict[int, list[Tensor]] = {0: [], 1: []}

    def work(number: int) -> None:
        for _ in range(5):
            found[number].append(outputs(model, batches[number]))

    threads = [threading.Thread(target=work, args=(number,)) for number in found]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(len(given) == 5 for given in found.values())
    assert all(torch.equal(got, expected[number]) for number, given in found.items() for got in given)


def test_both_kinds_of_method_are_told_apart() -> None:
    assert isinstance(TempScale(0.9), AttentionTransform)
    assert not isinstance(TempScale(0.9), TokenPolicy)
    plan = Plan([TempScale(0.9)])
    assert isinstance(plan, TokenPolicy)
    assert isinstance(plan, AttentionTransform)
    with pytest.raises(PlanError, match="Expected a method such as"):
        slimformer.patch(small("llama"), 3)


def test_a_second_patch_replaces_the_first_and_a_failed_one_keeps_it() -> None:
    model, given = small("llama"), arguments("llama", [(0, 61)], 61)
    expected = outputs(slimformer.patch(model, TempScale(0.5)), given)
    slimformer.patch(model, TempScale(0.9))
    slimformer.patch(model, TempScale(0.5))
    assert torch.equal(outputs(model, given), expected)
    with pytest.raises(UnsupportedModelError):
        slimformer.patch(model, PositionInterpolation(4))
    assert torch.equal(outputs(model, given), expected)


def test_weights_that_are_not_in_memory_cannot_be_checked() -> None:
    with torch.device("meta"):
        model = small("llama")
    with pytest.raises(UnsupportedModelError, match="not in memory"):
        slimformer.patch(model, TempScale(0.9))
