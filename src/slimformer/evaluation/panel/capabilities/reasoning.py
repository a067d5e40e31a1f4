"""The capability `reasoning`: word problems of two to four steps, answered by generation and judged by the answer.

What a plan loses of chains of calculation does not show in how likely it finds each word of one, since a single wrong
digit makes all that follows wrong. Worked examples come first (chain-of-thought prompting, arXiv 2201.11903), so that
solutions are short, and models without a chat template give them too.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Sequence

from slimformer.evaluation.panel.capabilities.yours import Prompt

# Of the problems, below which the dense model is not said to solve them.
LEAST = 0.3
# So many are asked first: a model that solves none of them is not asked the others.
FIRST = 8
# Most tokens of a solution.
SOLUTION = 64
_EXAMPLES = (
    (
        "Mia has 14 shells and finds 5 more on each of 3 days. Then Mia gives 6 shells to Omar. How many shells does "
        "Mia have left?",
        "On 3 days Mia finds 3 * 5 = 15 shells. Then Mia has 14 + 15 = 29 shells. After the gift Mia has 29 - 6 = 23 "
        "shells. The answer is 23.",
    ),
    (
        "A box holds 12 eggs. A farmer fills 7 boxes in the morning and 4 in the evening. How many eggs are in them?",
        "The farmer fills 7 + 4 = 11 boxes. They hold 11 * 12 = 132 eggs. The answer is 132.",
    ),
    (
        "Omar runs 6 kilometres a day for 5 days, and Mia runs half as far in all. How many kilometres do they run "
        "together?",
        "Omar runs 6 * 5 = 30 kilometres. Mia runs 30 / 2 = 15 kilometres. Together they run 30 + 15 = 45 kilometres. "
        "The answer is 45.",
    ),
)
_NAMES = ("Ann", "Ben", "Clara", "David", "Emma", "Felix", "Grace", "Henry")
_NUMBER = r"\d[\d,]*(?:\.\d+)?"
# As the examples say it; what a model goes on to write behind that is no longer the solution.
_SAID = re.compile(rf"answer is\D{{0,5}}({_NUMBER})")


def reasoning_prompts(count: int, seed: int) -> list[Prompt]:
    """Problems behind worked examples, of every kind equally many, with their answers.

    Args:
        count: How many.
        seed: Which names and numbers.

    Example:
        >>> first = reasoning_prompts(6, seed=0)[0]
        >>> first.prompt.splitlines()[-2][:28], first.answer
        ('Question: A ticket costs 15 ', '120')
    """
    drawn = random.Random(seed)
    shown = "".join(f"Question: {question}\nAnswer: {answer}\n\n" for question, answer in _EXAMPLES)
    found = []
    for number in range(count):
        text, answer = _KINDS[number % len(_KINDS)](drawn)
        found.append(Prompt(f"{shown}Question: {text}\nAnswer:", str(answer)))
    return found


def solves(written: str, answer: str) -> bool:
    """Whether the first number that is said to be the answer is right; if none is, the last of the first line.

    Example:
        >>> solves(" 20 + 1,004 = 1,024. The answer is 1,024. A box holds 7.", "1024"), solves("21, or 20.", "21")
        (True, False)
    """
    said = _SAID.search(written)
    numbers = [said[1]] if said else re.findall(_NUMBER, written.strip().partition("\n")[0])
    return bool(numbers) and float(numbers[-1].replace(",", "")) == float(answer)


def _marbles(drawn: random.Random) -> tuple[str, int]:
    first, second = drawn.sample(_NAMES, 2)
    own, bags, each, given = (drawn.randint(*limits) for limits in ((12, 40), (3, 9), (4, 12), (5, 15)))
    text = (
        f"{first} has {own} marbles and buys {bags} bags with {each} marbles in each. Then {first} gives {given} "
        f"marbles to {second}. How many marbles does {first} have left?"
    )
    return text, own + bags * each - given


def _tickets(drawn: random.Random) -> tuple[str, int]:
    first, second = drawn.sample(_NAMES, 2)
    some, more, price = drawn.randint(3, 9), drawn.randint(2, 6), drawn.randint(11, 25)
    text = (
        f"A ticket costs {price} euros. {first} buys {some} tickets, and {second} buys {more}. How many euros do they "
        "pay together?"
    )
    return text, (some + more) * price


def _pages(drawn: random.Random) -> tuple[str, int]:
    first, second = drawn.sample(_NAMES, 2)
    monday, times = 2 * drawn.randint(8, 20), drawn.randint(2, 4)
    text = (
        f"{first} reads {monday} pages on Monday and {times} times as many on Tuesday. {second} reads half of what "
        f"{first} reads on both days together. How many pages does {second} read?"
    )
    return text, monday * (1 + times) // 2


def _bolts(drawn: random.Random) -> tuple[str, int]:
    hours, rate, days, faulty = (drawn.randint(*limits) for limits in ((2, 6), (11, 30), (3, 8), (4, 10)))
    text = (
        f"A machine makes {rate} bolts in an hour. It runs for {hours} hours a day, on {days} days. Of all its bolts "
        f"{faulty} are faulty. How many good bolts does it make?"
    )
    return text, rate * hours * days - faulty


def _garden(drawn: random.Random) -> tuple[str, int]:
    rows, plants, price = drawn.randint(4, 9), drawn.randint(6, 14), drawn.randint(2, 5)
    change = drawn.randint(3, 40)
    text = (
        f"A gardener plants {rows} rows with {plants} tulips in each. A tulip costs {price} euros. The gardener pays "
        f"with {rows * plants * price + change} euros. How many euros of change does the gardener get?"
    )
    return text, change


def _ages(drawn: random.Random) -> tuple[str, int]:
    first, second = drawn.sample(_NAMES, 2)
    age, times, years = drawn.randint(5, 12), drawn.randint(2, 4), drawn.randint(3, 15)
    text = (
        f"{first} is {age} years old, and {second} is {times} times as old. How old will they be together in {years} "
        "years?"
    )
    return text, age * (1 + times) + 2 * years


_KINDS: Sequence[Callable[[random.Random], tuple[str, int]]] = (
    _tickets,
    _marbles,
    _pages,
    _bolts,
    _ages,
    _garden,
)
