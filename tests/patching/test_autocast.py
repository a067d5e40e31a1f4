"""Under autocast, chosen rows are those of computing all tokens and keeping the chosen ones."""

from __future__ import annotations

import pytest
import torch
from tests.methods.test_mixture_of_depths import routed

import slimformer
from slimformer import TokenElimination
from slimformer.methods.elimination.random_keep import RandomKeep
from slow_rows import arguments, batch, error, graded, kept, one_thread, outputs, positions, slowly, small  # noqa: F401
from tiny_models import DECODERS

NAMES = ["llama", "gemma2", "olmo2", "phi3", "gpt2", "gpt_neox", "bert", "distilbert", "modernbert"]
# Rounding to bfloat16 four layers deep; a wrong row is off by more than a tenth.
ROUNDED = 3e-2


@pytest.mark.parametrize("layout", ["left", "none"])
@pytest.mark.parametrize("name", NAMES)
def test_chosen_rows_are_right_under_autocast(name: str, layout: str) -> None:
    model, given, method = small(name), batch(name, layout), RandomKeep(0.5, seed=3)
    mask = given["attention_mask"]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        with slowly(model, kept(method, positions(mask))):
            expected = outputs(model, given)
        with slimformer.patched(model, method):
            actual = outputs(model, given)
            learnt = graded(model, given)
    assert actual.dtype == expected.dtype
    assert error(actual, expected, mask) <= ROUNDED
    assert error(learnt.detach(), expected, mask) <= ROUNDED
    learnt.float().square().mean().backward()
    assert all(p.grad is None or bool(p.grad.isfinite().all()) for p in model.parameters())


@pytest.mark.parametrize("name", NAMES)
def test_padding_leaves_under_autocast(name: str) -> None:
    model, given = small(name), batch(name, "left")
    mask = given["attention_mask"]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = outputs(model, given)
        actual = outputs(slimformer.patch(model), given)
    assert actual.dtype == expected.dtype
    assert error(actual, expected, mask) <= ROUNDED


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_routed_generation_runs_under_autocast(name: str) -> None:
    model = slimformer.patch(small(name), routed(attention=[1], mlp=[1, 2]))
    model.generation_config.disable_compile = True
    given = {"input_ids": arguments(name, [(0, 24)] * 18)["input_ids"]}
    options = {"do_sample": False, "min_new_tokens": 3, "max_new_tokens": 3, "output_logits": True,
               "return_dict_in_generate": True}  # fmt: skip
    exact = model.generate(**given, **options)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = model.generate(**given, **options)
    # Of the first token, behind the same prompt; a router may send few tokens another way for rounding.
    assert error(rounded.logits[0], exact.logits[0]) <= 0.1


@pytest.mark.parametrize("name", ["llama", "bert"])
def test_tokens_are_eliminated_under_autocast(name: str) -> None:
    model, given = small(name), batch(name, "left")
    method = TokenElimination({2: 0.6}, scorer="random", least=8, window=3, sink=2)
    slimformer.patch(model, method)
    mask, more = given["attention_mask"], {"use_cache": True} if name in DECODERS else {}
    exact = outputs(model, given, **more)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = outputs(model, given, **more)
    assert error(rounded, exact, mask) <= ROUNDED
