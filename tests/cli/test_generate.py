"""`slimformer generate`: what the patched model says."""

from __future__ import annotations

import torch

import slimformer
from command_line import refused, run
from slimformer import Plan
from slimformer.cli.loading import load_model
from tiny_checkpoints import tiny_tokenizer


def test_generate_prints_what_the_patched_model_says(llama: str, plan: str) -> None:
    arguments = ("generate", llama, "the end of it", "--max-new-tokens", 12)
    model, tokenizer = load_model(llama), tiny_tokenizer()
    ids = torch.tensor([tokenizer("the end of it")["input_ids"]])
    expected = []
    for methods in ([], [Plan.from_pretrained(plan)]):
        if methods:
            slimformer.patch(model, *methods)
        new = model.generate(ids, max_new_tokens=12, do_sample=False)[0, ids.shape[1] :]
        expected.append(tokenizer.decode(new, skip_special_tokens=True).strip())
    assert run(*arguments).stdout.strip() == expected[0]
    assert run(*arguments, "--plan", plan).stdout.strip() == expected[1]
    assert (
        run("generate", llama, "-", "--max-new-tokens", 12, typed="the end of it").stdout.strip()
        == expected[0]
    )


def test_generate_refuses_an_encoder_and_an_empty_prompt(llama: str, bert: str) -> None:
    assert "cannot generate" in refused("generate", bert, "Hi")
    assert "no token" in refused("generate", llama, "")
