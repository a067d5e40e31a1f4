"""The capability `reasoning`: word problems of two to four steps, answered by generation and judged by the last number.

What a plan loses of chains of calculation does not show in how likely it finds each word of one, since a single wrong
digit makes all that follows wrong.
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
_ASK = " Calculate step by step, and end with the answer as a number."
_NAMES = ("Ann", "Ben", "Clara", "David", "Emma", "Felix", "Grace", "Henry")
_NUMBER = re.compile(r"\d[\d,]*(?:\.\d+)?")


def reasoning_prompts(count: int, seed: int) -> list[tuple[str, Prompt]]:
    """Problems with their answers, of every kind equally many, and the kind of each.

    Args:
        count: How many.
        seed: Which names and numbers.

    Example:
        >>> kind, first = reasoning_prompts(6, seed=0)[0]
        >>> kind, first.prompt[:20], first.answer.isdigit()
        ('two steps', 'A ticket costs 15 eu', True)
    """
    drawn = random.Random(seed)
    found = []
    for number in range(count):
        kind, make = _KINDS[number % len(_KINDS)]
        text, answer = make(drawn)
        found.append((kind, Prompt(text + _ASK, str(answer))))
    return found


def ends_with(written: str, answer: str) -> bool:
    """Whether the last number that is written is the answer.

    Example:
        >>> ends_with("5 * 4 = 20, and 20 + 1,004 = 1,024.", "1024"), ends_with("It is 21, or 20.", "21")
        (True, False)
    """
    numbers = _NUMBER.findall(written)
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
    paid = rows * plants * price + change
    text = (
        f"A gardener plants {rows} rows with {plants} tulips in each. A tulip costs {price} euros. The gardener pays "
        f"with {paid} euros. How many euros of change does the gardener get?"
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


_KINDS: Sequence[tuple[str, Callable[[random.Random], tuple[str, int]]]] = (
    ("two steps", _tickets),
    ("three steps", _marbles),
    ("three steps", _pages),
    ("three steps", _bolts),
    ("three steps", _ages),
    ("three steps", _garden),
)
