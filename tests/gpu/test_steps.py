"""Cached steps under kernels, launched one by one, from CUDA graphs and compiled, give what they give in float32."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedModel, StaticCache

import slimformer
from gpu.plans import METHODS, routed
from gpu.subjects import (
    DECODERS,
    DEVICE,
    DRY,
    DTYPES,
    TOLERANCE,
    arguments,
    build,
    by_steps,
    launched,
    moved,
    off,
    off_the_default_stream,
    outputs,
    steps_in_float32,
    typical,
    with_kernels,
)

NAMED = {method.name: method for method in METHODS}
dtypes = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
# As many rows as are worth choosing among in a step; long enough that tokens leave and positions are grouped.
TEXTS = ((30, 124), (0, 154), (110, 44)) * 6
PROMPT, STEPS = 150, (1, 1, 2)
ROOM = 160
STEPPED = [
    *((name, "plain") for name in DECODERS),
    *(("llama", name) for name in (
        "drop-mean", "drop-filter", "exit", "routed-threshold", "random-ragged", "leave-random", "come-back", "delta",
        "temperature", "log-n", "self-extend", "rope-linear", "all-fixed",
    )),
    ("glm", "self-extend"), ("gpt_neox", "drop-filter"), ("gpt_neox", "random-ragged"), ("gemma2", "come-back"),
]  # fmt: skip
# With tokens that leave, or whose number a step has to know, no static cache and no graph is possible.
STATIC = [("llama", "plain"), ("qwen3", "plain"), ("gemma2", "plain"), ("glm", "plain"), ("llama", "drop-filter"),
          ("llama", "routed-threshold"), ("llama", "random-ragged")]  # fmt: skip
STEP_KERNELS = {"self-extend": ("self_extend_decode",), "routed-threshold": ("router_scores",)}


@dtypes
@pytest.mark.parametrize(("name", "plan"), STEPPED)
def test_steps_behind_a_prompt(name: str, plan: str, dtype: torch.dtype) -> None:
    check(name, plan, dtype, lambda model: DynamicCache(config=model.config))


@dtypes
@pytest.mark.parametrize(("name", "plan"), STATIC)
def test_steps_in_a_static_cache(name: str, plan: str, dtype: torch.dtype) -> None:
    check(name, plan, dtype, lambda model: StaticCache(config=model.config, max_cache_len=ROOM))


def check(name: str, plan: str, dtype: torch.dtype, cache_for: Callable[[Any], Cache]) -> None:
    """A prompt and some steps, in half precision with kernels beside float32 on the CPU."""
    method = NAMED[plan]
    model = slimformer.patch(build(name, dtype, DEVICE), *method.plan())
    given = arguments(name, TEXTS, PROMPT + sum(STEPS))
    with with_kernels() as launches:
        actual = by_steps(model, moved(given), cache_for(model), PROMPT, STEPS)
    assert launched(launches, *STEP_KERNELS.get(plan, ())), launches
    expected, mask = steps_in_float32(name, method, TEXTS, PROMPT, STEPS), given["attention_mask"].clone()
    measure = typical if method.chooses else off
    assert measure(actual, expected, mask) <= TOLERANCE[dtype]
    # The prompt is long; the steps count as much.
    mask[:, :PROMPT] = 0
    assert measure(actual, expected, mask) <= TOLERANCE[dtype]


def test_a_routed_step_of_one_token_leaves_out_weights_that_no_token_wants() -> None:
    sizes = {
        "hidden_size": 2048,
        "intermediate_size": 4096,
        "num_attention_heads": 16,
        "num_hidden_layers": 2,
    }
    texts, dtype = ((0, 24),), torch.bfloat16

    def patched(model: Any) -> Any:
        return slimformer.patch(model, routed(hidden=2048, attention=[1], mlp=[0, 1]))

    given = arguments("llama", texts, 24)
    small = patched(build("llama", **sizes))
    expected = by_steps(small, given, DynamicCache(config=small.config), 8, (1,) * 16)
    model = patched(build("llama", dtype, DEVICE, **sizes))
    with with_kernels() as launches:
        actual = by_steps(model, moved(given), DynamicCache(config=model.config), 8, (1,) * 16)
    assert launched(launches, "linear_if_any", "router_scores"), launches
    assert typical(actual, expected, given["attention_mask"]) <= TOLERANCE[dtype]


def captured(call: Callable[[], Tensor], rewind: Callable[[], None]) -> Callable[[], Tensor]:
    """What replays the launches of a call; on the CPU the call."""
    if DRY:
        return call
    with off_the_default_stream():
        for _ in range(2):
            rewind()
            call()
    rewind()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = call()

    def replay() -> Tensor:
        graph.replay()
        return out

    return replay


@pytest.mark.parametrize(("name", "plan"), STATIC)
def test_one_graph_decodes_token_by_token(name: str, plan: str) -> None:
    method, texts = NAMED[plan], ((0, 44),) * 18
    given = arguments(name, texts, 44)
    model = slimformer.patch(build(name, torch.bfloat16, DEVICE), *method.plan())
    with with_kernels() as launches:
        found = decoded_by_a_graph(model, given["input_ids"].to(DEVICE))
    assert launched(launches, *STEP_KERNELS.get(plan, ())) or DRY
    expected = steps_in_float32(name, method, texts, 40, (1,) * 4)[:, 40:]
    measure, text = typical if method.chooses else off, given["attention_mask"][:, 40:]
    allowed = TOLERANCE[torch.bfloat16]
    if plan == "plain":
        # Where a mask's offset is a number of Python's, as for sliding windows, a graph keeps that of its first step.
        own = decoded_by_a_graph(build(name, torch.bfloat16, DEVICE), given["input_ids"].to(DEVICE))
        allowed = max(allowed, 1.1 * off(own, expected, text))
    assert measure(found, expected, text) <= allowed


def decoded_by_a_graph(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """Logits of the last four tokens, each from the replay of one graph, behind a prompt of 40."""
    past = StaticCache(config=model.config, max_cache_len=ROOM)
    token, place = ids[:, 40:41].clone(), torch.full_like(ids[:, :1], 40)

    def step() -> Tensor:
        return outputs(
            model, {"input_ids": token, "position_ids": place}, past_key_values=past, use_cache=True
        )

    def rewind() -> None:
        past.reset()
        outputs(model, {"input_ids": ids[:, :40]}, past_key_values=past, use_cache=True)

    rewind()
    replay = captured(step, rewind)
    rewind()
    found = []
    for index in range(40, 44):
        token.copy_(ids[:, index : index + 1])
        place.fill_(index)
        found.append(replay().clone())
    return torch.cat(found, 1)


@pytest.mark.parametrize(("name", "plan"), [("llama", "plain"), ("bert", "plain"), ("llama", "random-equal")])
def test_a_graph_of_a_whole_batch_is_replayed_on_other_texts(name: str, plan: str) -> None:
    method, dtype, texts = NAMED[plan], torch.bfloat16, ((0, 64),) * 4
    model = slimformer.patch(build(name, dtype, DEVICE), *method.plan())
    first = {"input_ids": arguments(name, texts, 64)["input_ids"].to(DEVICE)}
    more = {"use_cache": False} if name in DECODERS else {}
    with with_kernels() as launches:
        replay = captured(lambda: outputs(model, first, **more), lambda: None)
    other = first["input_ids"].flip(1).clone()
    first["input_ids"].copy_(other)
    small = slimformer.patch(build(name), *method.plan())
    expected = outputs(small, {"input_ids": other.cpu()}, **more)
    # Without padding BERT has none at this size.
    assert launched(launches) or DRY or name == "bert"
    assert off(replay(), expected, torch.ones_like(other)) <= TOLERANCE[dtype]


def test_compiled_prompt_and_steps() -> None:
    method, dtype, texts = NAMED["drop-filter"], torch.bfloat16, ((0, 44),) * 2
    model = slimformer.patch(build("llama", dtype, DEVICE), *method.plan())
    given = moved(arguments("llama", texts, 44))
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, dynamic=False, backend="eager" if DRY else "inductor")
    past = StaticCache(config=model.config, max_cache_len=ROOM)
    found = [
        outputs(compiled, {"input_ids": given["input_ids"][:, :40]}, past_key_values=past, use_cache=True)
    ]
    for index in range(40, 44):
        step = {"input_ids": given["input_ids"][:, index : index + 1]}
        found.append(outputs(compiled, step, past_key_values=past, use_cache=True).clone())
    expected = steps_in_float32("llama", method, texts, 40, (1,) * 4)
    assert off(torch.cat(found, 1), expected, given["attention_mask"]) <= TOLERANCE[dtype]
