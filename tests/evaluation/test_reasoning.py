"""Word problems have the answers that they ask for, and what a model writes is judged by the number at its end."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest

from slimformer.evaluation.panel import Panel
from slimformer.evaluation.panel.capabilities import reasoning
from slimformer.evaluation.panel.capabilities.prompts import continued
from slimformer.evaluation.panel.capabilities.reasoning import reasoning_prompts, solves
from slimformer.evaluation.panel.capabilities.yours import Matches
from slimformer.evaluation.panel.sizes import SIZES
from tiny_checkpoints import tiny_tokenizer
from tiny_models import tiny_model

# What each kind asks, from the numbers in the order in which they stand there.
SOLVED: dict[str, Callable[..., int]] = {
    "ticket": lambda price, some, more: (some + more) * price,
    "marbles": lambda own, bags, each, given: own + bags * each - given,
    "pages": lambda monday, times: (monday + times * monday) // 2,
    "bolts": lambda rate, hours, days, faulty: rate * hours * days - faulty,
    "together in": lambda age, times, years: age + times * age + 2 * years,
    "tulip": lambda rows, plants, price, paid: paid - rows * plants * price,
}


def test_every_problem_has_the_answer_that_it_asks_for() -> None:
    problems = reasoning_prompts(60, seed=3)
    asked = set()
    for problem in problems:
        question = problem.prompt.rpartition("Question: ")[2]
        kind = next(kind for kind in SOLVED if kind in question)
        numbers = [int(number) for number in re.findall(r"\d+", question)]
        assert problem.answer == str(SOLVED[kind](*numbers)), problem.prompt
        assert int(problem.answer) > 0
        asked.add(kind)
    assert asked == set(SOLVED)
    assert problems == reasoning_prompts(60, seed=3)
    assert problems != reasoning_prompts(60, seed=4)


@pytest.mark.parametrize(
    ("written", "right"),
    [
        ("3 * 4 = 12, and 12 + 8 = 20", True),
        ("The answer is **20** euros.", True),
        ("4 * 5 = 20. The answer is 20.Human: A box holds 12 eggs.", True),
        ("4 * 5 = 21. The answer is 21. Or is it 20", False),
        ("20.00", True),
        ("1,020", False),
        ("20 - 3 = 17", False),
        ("I do not know.", False),
        (" 4 * 5 = 20.\n\nQuestion: What is 3 + 4?", True),
    ],
)
def test_the_number_at_the_end_is_the_answer(written: str, right: bool) -> None:
    assert solves(written, "20") is right


def test_a_model_that_solves_nothing_is_not_judged_by_it() -> None:
    model = tiny_model("llama", max_position_embeddings=2048)
    tokenizer = tiny_tokenizer()
    tokenizer.model_max_length = 2048
    panel = Panel.recorded(model, tokenizer, budget="quick", capabilities=["text", "reasoning"])
    assert panel.left_out["reasoning"].startswith("the dense model itself solves 0% of the problems")
    assert [capability.name for capability in panel.capabilities] == ["text"]


def test_kept_is_the_part_of_what_the_dense_model_solves() -> None:
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    prompts = [[token, token + 1] for token in range(4, 12)]
    asked = Matches.recorded(
        "reasoning", model, tokenizer, prompts, ["20"] * 8, 4, 0, lambda written, answer: True
    )
    assert float(asked.judged(model).kept) == 1.0
    # Another criterion decides what is right, for the dense model and for those that are judged.
    other = tiny_model("gpt2")
    written = [tokenizer.decode(ids, skip_special_tokens=True) for ids in continued(model, prompts, 4)]
    same = Matches.recorded("reasoning", model, tokenizer, prompts, written, 4, 0)
    assert float(same.dense.mean()) == 1.0
    assert same.judged(other).kept < 1.0


def test_worked_examples_are_right_and_none_of_the_problems() -> None:
    prompts = reasoning_prompts(12, seed=0)
    *examples, _ = prompts[0].prompt.split("Question: ")[1:]
    for example in examples:
        for left, right in re.findall(r"(\d+ [-+*/] \d+) = (\d+)", example):
            assert eval(left) == int(right), example
        assert not any(
            example.partition("\n")[0] in prompt.prompt.rpartition("Question: ")[2] for prompt in prompts
        )


def test_all_problems_are_asked_of_a_model_that_solves_some(monkeypatch: pytest.MonkeyPatch) -> None:
    # What a model of random weights writes solves nothing, so that everything but "nothing" counts here.
    monkeypatch.setattr(reasoning, "solves", lambda written, answer: bool(written) and int(answer) % 2 == 0)
    model, tokenizer = tiny_model("llama", max_position_embeddings=2048), tiny_tokenizer()
    tokenizer.model_max_length = 2048
    panel = Panel.recorded(model, tokenizer, budget="quick", capabilities=["reasoning"])
    (found,) = panel.capabilities
    asked = reasoning_prompts(SIZES["quick"].problems, seed=0)
    assert isinstance(found, Matches)
    assert list(found.answers) == [problem.answer for problem in asked]
    assert len(found.prompts) == len(found.dense) == len(asked)
    even = [int(problem.answer or 0) % 2 == 0 for problem in asked]
    assert found.dense.tolist() == [float(right) for right in even]
    assert found.judged(model).kept == 1.0
