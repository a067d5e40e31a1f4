"""Threads that use one model: each call ends on the model that it began on, and what a call was told goes with it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from tests.patching.test_undo import IDS, attributes, outputs, sharp
from torch import Tensor
from transformers import LogitsProcessor

import slimformer
from slimformer import LayerDrop, TokenElimination
from slimformer.errors import SlimformerError
from slimformer.patching import keep_ratios, patched, switched_off
from slimformer.rows.sdpa_backend import without_cudnn

DROP = LayerDrop(attention=[1], mlp=[2])
# Long enough for a change that does not wait; one that waits ends when the call does.
SOON = 0.3


class Once(LogitsProcessor):
    """Runs something in the middle of a generation."""

    def __init__(self, action: Callable[[], None]) -> None:
        self.action: Callable[[], None] | None = action

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if self.action is not None and input_ids.shape[1] > IDS.shape[1] + 1:
            action, self.action = self.action, None
            action()
        return scores


def generated(model: Any, *processors: LogitsProcessor) -> Tensor:
    found: Tensor = model.generate(
        IDS,
        attention_mask=torch.ones_like(IDS),
        max_new_tokens=8,
        min_new_tokens=8,
        do_sample=False,
        logits_processor=list(processors),
    )
    return found


@pytest.fixture
def others() -> Iterator[list[threading.Thread]]:
    """Threads that a test starts."""
    threads: list[threading.Thread] = []
    yield threads
    for thread in threads:
        thread.join()


def soon(others: list[threading.Thread], action: Callable[[], Any]) -> Callable[[], None]:
    """Start something in another thread, and let it go on."""

    def start() -> None:
        thread = threading.Thread(target=action)
        thread.start()
        others.append(thread)
        thread.join(SOON)

    return start


@pytest.mark.parametrize("change", ["unpatch", "patch anew", "patch"])
def test_a_generation_ends_on_the_model_it_began_on(change: str, others: list[threading.Thread]) -> None:
    model, other = sharp(), LayerDrop(attention=[2])
    if change != "patch":
        slimformer.patch(model, DROP)
    expected = generated(model)
    action = {
        "unpatch": lambda: slimformer.unpatch(model),
        "patch anew": lambda: slimformer.patch(model, other),
        "patch": lambda: slimformer.patch(model, DROP),
    }[change]
    assert torch.equal(generated(model, Once(soon(others, action))), expected)
    others[0].join()
    then = sharp()
    if change != "unpatch":
        slimformer.patch(then, other if change == "patch anew" else DROP)
    assert torch.equal(outputs(model), outputs(then))
    assert attributes(slimformer.unpatch(model)) == attributes(sharp())


@pytest.mark.parametrize("first", [None, DROP], ids=["dense", "patched"])
def test_a_forward_pass_ends_on_the_model_it_began_on(first: Any, others: list[threading.Thread]) -> None:
    model = sharp() if first is None else slimformer.patch(sharp(), first)
    expected = outputs(model)
    changes = [soon(others, lambda: slimformer.patch(model, LayerDrop(attention=[0, 2])))]
    handle = model.model.embed_tokens.register_forward_hook(
        lambda *given: changes.pop()() if changes else None
    )
    assert torch.equal(outputs(model), expected)
    handle.remove()
    others[0].join()
    assert torch.equal(outputs(model), outputs(slimformer.patch(sharp(), LayerDrop(attention=[0, 2]))))


def test_a_call_that_comes_during_a_change_waits_for_its_end(others: list[threading.Thread]) -> None:
    model = slimformer.patch(sharp(), DROP)
    expected, dense = outputs(model), outputs(sharp())
    found: list[Tensor] = []
    with switched_off(model):
        soon(others, lambda: found.append(outputs(model)))()
        assert torch.equal(outputs(model), dense)
    others[0].join()
    assert torch.equal(found[0], expected)


def test_a_change_inside_a_call_needs_the_model_for_itself(others: list[threading.Thread]) -> None:
    model, there, go_on = slimformer.patch(sharp(), DROP), threading.Event(), threading.Event()
    expected = generated(model)

    def pause() -> None:
        there.set()
        go_on.wait()

    def inside() -> None:
        with switched_off(model):
            outputs(model)

    # Alone, a generation may look at the dense model between two steps.
    assert torch.equal(generated(model, Once(inside)), expected)
    soon(others, lambda: generated(model, Once(pause)))()
    there.wait()
    try:
        with pytest.raises(SlimformerError, match="from inside one of its calls"):
            generated(model, Once(inside))
    finally:
        go_on.set()


def test_many_threads_generate_while_the_model_is_patched_over_and_over() -> None:
    model, stop = sharp(), threading.Event()
    dense, slim = generated(model), generated(slimformer.patch(sharp(), DROP))

    def serve() -> int:
        runs = 0
        while not stop.is_set() or not runs:
            found = generated(model)
            assert torch.equal(found, dense) or torch.equal(found, slim)
            runs += 1
        return runs

    with ThreadPoolExecutor(2) as pool:
        served = [pool.submit(serve) for _ in range(2)]
        for _ in range(6):
            slimformer.patch(model, DROP)
            with patched(model):
                pass
            slimformer.unpatch(model)
        stop.set()
        assert all(future.result() for future in served)
    assert attributes(model) == attributes(sharp())


def test_protected_tokens_stay_in_threads_started_in_the_block() -> None:
    model = sharp()
    method = TokenElimination({1: 0.25}, scorer="random", revivable=True, least=8, window=1, sink=1)
    slimformer.patch(model, method)
    protect = torch.zeros(2, 20, dtype=torch.bool)
    protect[:, :15] = True

    def kept() -> float:
        outputs(model)
        return keep_ratios(model)[1, "mlp"]

    def in_a_thread(found: list[float]) -> None:
        thread = threading.Thread(target=lambda: found.append(kept()))
        thread.start()
        thread.join()

    plain = kept()
    found: list[float] = []
    with method.protecting(protect):
        expected = kept()
        in_a_thread(found)
        with ThreadPoolExecutor(1) as pool:
            found.append(pool.submit(kept).result())
    assert expected >= 0.75 > plain
    assert found == [expected, expected]
    with ThreadPoolExecutor(1) as pool:
        with method.protecting(protect):
            assert pool.submit(kept).result() == expected
        # The pool's thread goes on, and the block is over.
        assert pool.submit(kept).result() == plain
    in_a_thread(found)
    assert found[-1] == plain


def test_a_block_that_protects_concerns_the_calls_of_its_own_thread_and_method() -> None:
    model = sharp()
    method = TokenElimination({1: 0.25}, scorer="random", revivable=True, least=8, window=1, sink=1)
    slimformer.patch(model, method)
    ratios: list[float] = []
    outputs(model)
    plain, protect = keep_ratios(model)[1, "mlp"], torch.ones(2, 20, dtype=torch.bool)
    opened, done = threading.Event(), threading.Event()

    def other() -> None:
        opened.wait()
        outputs(model)
        ratios.append(keep_ratios(model)[1, "mlp"])
        done.set()

    thread = threading.Thread(target=other)
    thread.start()
    with method.protecting(protect):
        opened.set()
        done.wait()
    thread.join()
    with TokenElimination({1: 0.25}).protecting(protect):
        outputs(model)
        ratios.append(keep_ratios(model)[1, "mlp"])
    assert ratios == [plain, plain]


def test_cudnn_is_on_again_when_blocks_of_two_threads_overlap() -> None:
    before = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(True)
    try:
        without_cudnn.__enter__()
        without_cudnn.__enter__()
        without_cudnn.__exit__()
        assert not torch.backends.cuda.cudnn_sdp_enabled()
        without_cudnn.__exit__()
        assert torch.backends.cuda.cudnn_sdp_enabled()
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)
