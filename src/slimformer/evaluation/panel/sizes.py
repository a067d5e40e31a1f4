"""How much each budget of the panel reads."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

PanelBudget = Literal["quick", "standard", "thorough"]


@dataclass(frozen=True)
class Sizes:
    """Rows and tokens of every capability.

    Attributes:
        text_rows: Rows of text, spread over its kinds.
        text_tokens: Tokens of each.
        prompts: Prompts that the dense model continues.
        new_tokens: Most tokens that it writes to each.
        copies: Random sequences that are repeated at once.
        copy_tokens: Tokens of each.
        gaps: Tokens of text between the two runs of further sequences.
        far_copies: So many sequences for every gap.
        keys: Prompts with a key, for every length.
        lengths: Tokens of these prompts, where the user names none.
        problems: Word problems that are to be solved.
        texts: Texts of each length whose neighbours are looked for, for encoders.
    """

    text_rows: int
    text_tokens: int
    prompts: int
    new_tokens: int
    copies: int
    copy_tokens: int
    gaps: tuple[int, ...]
    far_copies: int
    keys: int
    lengths: tuple[int, ...]
    problems: int
    texts: int


SIZES: dict[PanelBudget, Sizes] = {
    "quick": Sizes(12, 128, 21, 32, 6, 48, (), 0, 6, (512,), 18, 48),
    # Two minutes on two CPU cores for a model of 135M parameters, a minute on a GPU for one of 1.5B.
    "standard": Sizes(18, 192, 35, 64, 8, 64, (1024,), 3, 8, (768,), 36, 96),
    "thorough": Sizes(48, 512, 60, 256, 24, 128, (1024, 4096), 12, 16, (1024, 4096), 120, 400),
}
