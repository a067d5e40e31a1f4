"""How much text each budget of calibration reads."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

BudgetName = Literal["quick", "standard", "thorough"]


@dataclass(frozen=True)
class Budget:
    """Sizes, in blocks of `sequence_length` tokens (for encoders: in texts of at most so many).

    Attributes:
        sequence_length: Tokens per block.
        similarity: Blocks on which cosines are measured.
        judged: Blocks on which candidates of the greedy search are judged.
        fitted: Blocks on which replacements are fitted during the search.
        final: Blocks on which they are fitted in the end.
        pool: Candidates per wanted removal, those of highest cosine; None for all.
    """

    sequence_length: int
    similarity: int
    judged: int
    fitted: int
    final: int
    pool: int | None

    @property
    def blocks(self) -> int:
        """Blocks in all; similarity is measured on some of those that the rest is done with."""
        return max(self.similarity, self.judged + self.final)


BUDGETS: dict[BudgetName, Budget] = {
    # A minute on two CPU cores for a model of 135M parameters.
    "quick": Budget(256, similarity=12, judged=4, fitted=16, final=32, pool=2),
    "standard": Budget(1024, similarity=32, judged=16, fitted=48, final=640, pool=None),
    # 256 samples of 2048 tokens are LLM-Drop's own calibration.
    "thorough": Budget(2048, similarity=256, judged=32, fitted=64, final=512, pool=None),
}
