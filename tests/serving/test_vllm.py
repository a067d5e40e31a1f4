"""vLLM, on the CPU, serves what was exported: greedy tokens and log-probabilities are those of the patched model.

`make test-serving` runs these in an environment of their own.
"""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import slimformer
from serving.checkpoints import PLANS, PROMPTS, fitted, spread_checkpoint
from slimformer import LayerDrop

vllm = pytest.importorskip("vllm")

TOKENS = 12
FORMATS = {
    "blocks": "checkpoint",
    "attentions": "nemotron-nas",
    "joint": "nemotron-nas",
    "replaced": "slimformer",
}
ROOM = {
    "dtype": "float32",
    "enforce_eager": True,
    "gpu_memory_utilization": 0.2,
    "kv_cache_memory_bytes": 2**28,
}


@contextlib.contextmanager
def served(folder: Path, monkeypatch: pytest.MonkeyPatch, **options: Any) -> Iterator[Any]:
    """vLLM's engine on a folder."""
    # In this process, which has loaded vLLM.
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    engine = vllm.LLM(str(folder), **{**ROOM, "max_model_len": 256, **options})
    try:
        yield engine
    finally:
        engine.llm_engine.engine_core.shutdown()
        del engine
        gc.collect()


def compare(engine: Any, model: Any, prompts: list[list[int]], atol: float) -> None:
    """Greedy tokens are those of the model, and so are their log-probabilities."""
    settings = vllm.SamplingParams(temperature=0, max_tokens=TOKENS, logprobs=1, ignore_eos=True)
    answers = engine.generate([{"prompt_token_ids": ids} for ids in prompts], settings)
    assert len(answers) == len(prompts)
    for ids, answer in zip(prompts, answers, strict=True):
        tokens = list(answer.outputs[0].token_ids)
        with torch.no_grad():
            likely = model(torch.tensor([ids + tokens])).logits.log_softmax(-1)[0, len(ids) - 1 : -1]
        # Every token is what the patched model would take behind the tokens before it.
        assert tokens == likely.argmax(-1).tolist()
        said = [step[token].logprob for step, token in zip(answer.outputs[0].logprobs, tokens, strict=True)]
        torch.testing.assert_close(torch.tensor(said), likely.amax(-1), atol=atol, rtol=0)


@pytest.mark.parametrize("name", PLANS)
def test_tokens_and_log_probabilities_of_smollm2_are_those_of_the_patched_model(
    name: str, smollm2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = slimformer.export(smollm2, PLANS[name], tmp_path / "slim", to="vllm")
    assert done.format == FORMATS[name]
    model = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32).eval()
    slimformer.patch(model, *PLANS[name])
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    prompts = [tokenizer(prompt).input_ids for prompt in PROMPTS]
    with served(tmp_path / "slim", monkeypatch) as engine:
        answers = engine.generate(PROMPTS[:3], vllm.SamplingParams(max_tokens=1))
        assert [answer.prompt_token_ids for answer in answers] == prompts[:3]
        compare(engine, model, prompts, 1e-3)


# As wide as vLLM's attention on the CPU takes them.
WIDTHS = {
    "hidden_size": 64,
    "head_dim": 32,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "intermediate_size": 96,
}


@pytest.mark.parametrize("name", ["llama", "mistral", "qwen2", "qwen3", "gemma3_text"])
def test_every_family_of_the_plugin_is_computed_as_the_patched_model_does(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = [
        fitted("filter", ("attention", 1), hidden=64),
        fitted("mean", ("mlp", 3), hidden=64),
        LayerDrop(attention=[0], mlp=[2]),
    ]
    model = spread_checkpoint(tmp_path / "whole", name, num_hidden_layers=6, **WIDTHS)
    done = slimformer.export(tmp_path / "whole", plan, tmp_path / "slim", to="vllm")
    assert done.format == "slimformer"
    slimformer.patch(model, *plan)
    ids = torch.randint(3, 300, (8, 40), generator=torch.Generator().manual_seed(1)).tolist()
    with served(tmp_path / "slim", monkeypatch, max_model_len=64) as engine:
        compare(engine, model, ids, 1e-3)


def test_texts_that_begin_alike_share_their_cache(
    smollm2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = PLANS["replaced"]
    slimformer.export(smollm2, plan, tmp_path / "slim", to="vllm")
    model = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32).eval()
    slimformer.patch(model, *plan)
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    begin = tokenizer(" ".join(PROMPTS[:20])).input_ids
    prompts = [begin + tokenizer(f" {prompt}").input_ids for prompt in PROMPTS[:4]]
    with served(tmp_path / "slim", monkeypatch, enable_prefix_caching=True, max_model_len=512) as engine:
        compare(engine, model, prompts[:1], 1e-3)
        compare(engine, model, prompts, 1e-3)
        settings = vllm.SamplingParams(temperature=0, max_tokens=1)
        [answer] = engine.generate([{"prompt_token_ids": prompts[1]}], settings)
    assert answer.num_cached_tokens > len(begin) // 2


def test_two_processes_share_a_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = [fitted("filter", ("attention", 1), hidden=64), LayerDrop(attention=[0], mlp=[2])]
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 128}
    model = spread_checkpoint(tmp_path / "whole", "llama", **{**WIDTHS, **heads})
    slimformer.export(tmp_path / "whole", plan, tmp_path / "slim", to="vllm")
    slimformer.patch(model, *plan)
    ids = torch.randint(3, 300, (8, 40), generator=torch.Generator().manual_seed(1)).tolist()
    # A core for each: by itself vLLM looks for as many memory nodes.
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")
    with served(tmp_path / "slim", monkeypatch, tensor_parallel_size=2, max_model_len=64) as engine:
        compare(engine, model, ids, 1e-3)


def test_a_plan_drafts_for_its_whole_model_whose_tokens_stay_the_same(
    smollm2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slimformer.export(smollm2, PLANS["attentions"], tmp_path / "slim", to="vllm")
    draft = {"method": "draft_model", "model": str(tmp_path / "slim"), "num_speculative_tokens": 4}
    model = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    ids = [tokenizer(prompt).input_ids for prompt in PROMPTS[:10]]
    with served(smollm2, monkeypatch, speculative_config=draft, disable_log_stats=False) as engine:
        compare(engine, model, ids, 1e-3)
        counted = {metric.name: getattr(metric, "value", 0) for metric in engine.get_metrics()}
    assert counted["vllm:spec_decode_num_accepted_tokens"] > 0
