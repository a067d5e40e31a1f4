"""What became of drafts, for `status`."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class Tally:
    """Counts since the model was patched.

    Attributes:
        tokens: Generated with drafts allowed.
        steps: Forward passes of the model for them.
        drafted: Tokens that the draft proposed.
        accepted: How many of those were right.
        copied: Tokens that were looked up in the text.
        copies_accepted: How many of those were right.
        without: Why the last call of `generate` had no drafts; empty if it had.
    """

    tokens: int = 0
    steps: int = 0
    drafted: int = 0
    accepted: int = 0
    copied: int = 0
    copies_accepted: int = 0
    without: str = ""

    def count(self, drafted: int, copied: int, accepted: int) -> None:
        """One step, which checked so many drafted or copied tokens and accepted so many."""
        self.tokens, self.steps = self.tokens + accepted + 1, self.steps + 1
        self.drafted, self.copied = self.drafted + drafted, self.copied + copied
        self.accepted += accepted if drafted else 0
        self.copies_accepted += accepted if copied else 0

    def __str__(self) -> str:
        parts = []
        if self.steps:
            parts.append(f"{self.tokens} tokens in {self.steps} steps")
        if self.drafted:
            parts.append(f"{self.accepted / self.drafted:.0%} of {self.drafted} drafted tokens accepted")
        if self.copied:
            parts.append(
                f"{self.copies_accepted / self.copied:.0%} of {self.copied} looked up in the text accepted"
            )
        if self.without:
            parts.append(f"none in the last call: {self.without}")
        return ", ".join(parts) or "none yet"
