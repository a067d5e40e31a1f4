"""vLLM, on the CPU, serves what was exported: greedy tokens and log-probabilities are those of the patched model.

`make test-serving` runs these in an environment of their own.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import slimformer
from real_models import smollm2
from slimformer import LayerDrop

vllm = pytest.importorskip("vllm")

PROMPTS = [f"{how} {what}" for how in ("Here is a short text about", "The history of", "A question on", "Once,",
                                       "Write down what you know of") for what in
           ("rain", "old ships", "bread", "the moon", "two cats", "a city by the sea", "numbers", "snow", "trade",
            "music")]  # fmt: skip
TOKENS = 12
HIDDEN = 576


def fitted(replace: Any, *sublayers: tuple[Any, int]) -> LayerDrop:
    """Random small weights in place of sublayers."""
    weights = {}
    for kind, layer in sublayers:
        generator = torch.Generator().manual_seed(layer)
        weights[f"{kind}.{layer}.bias"] = torch.randn(HIDDEN, generator=generator) / 50
        weights[f"{kind}.{layer}.weight"] = torch.randn(HIDDEN, HIDDEN, generator=generator) / 500
    named = {kind: [layer for of, layer in sublayers if of == kind] for kind in ("attention", "mlp")}
    return LayerDrop(**named, replace=replace, weights=weights)


PLANS = {
    "checkpoint": [LayerDrop(block=[10, 20, 22])],
    "nemotron-nas": [LayerDrop(attention=[12, 20, 22, 24], mlp=[15, 22, 25])],
    "slimformer": [
        fitted("filter", ("attention", 0), ("attention", 20), ("mlp", 21)),
        fitted("mean", ("attention", 24), ("mlp", 12), ("mlp", 0)),
        LayerDrop(attention=[12], mlp=[14]),
    ],
}


@pytest.fixture(scope="module")
def whole() -> Path:
    return smollm2()


@pytest.fixture
def served(whole: Path, tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[tuple[str, Any]]:
    name = request.param
    done = slimformer.export(str(whole), PLANS[name], tmp_path / "slim", to="vllm")
    assert done.format == name
    room = {"gpu_memory_utilization": 0.2, "kv_cache_memory_bytes": 2**29, "max_model_len": 256}
    engine = vllm.LLM(str(tmp_path / "slim"), dtype="float32", enforce_eager=True, **room)
    yield name, engine
    del engine
    gc.collect()


@pytest.mark.parametrize("served", PLANS, indirect=True)
def test_tokens_and_log_probabilities_are_those_of_the_patched_model(
    served: tuple[str, Any], whole: Path
) -> None:
    name, engine = served
    tokenizer = AutoTokenizer.from_pretrained(whole)
    model = AutoModelForCausalLM.from_pretrained(whole, dtype=torch.float32).eval()
    slimformer.patch(model, *PLANS[name])
    settings = vllm.SamplingParams(temperature=0, max_tokens=TOKENS, logprobs=1, ignore_eos=True)
    answers = engine.generate(PROMPTS, settings)
    assert len(answers) == len(PROMPTS)
    for prompt, answer in zip(PROMPTS, answers, strict=True):
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        assert answer.prompt_token_ids == ids[0].tolist()
        given = torch.tensor([[*answer.prompt_token_ids, *answer.outputs[0].token_ids]])
        with torch.no_grad():
            likely = model(given).logits.log_softmax(-1)[0, ids.shape[1] - 1 : -1]
        # Every token is what the patched model would take behind the tokens before it.
        assert list(answer.outputs[0].token_ids) == likely.argmax(-1).tolist()
        said = [
            step[token].logprob
            for step, token in zip(answer.outputs[0].logprobs, answer.outputs[0].token_ids, strict=True)
        ]
        torch.testing.assert_close(torch.tensor(said), likely.amax(-1), atol=1e-3, rtol=0)
