"""What the kernels raise when they are called wrongly."""

from __future__ import annotations


class KernelArgumentError(ValueError):
    """An argument has a shape, dtype, layout, device or value that the function cannot take.

    Example:
        >>> print(KernelArgumentError.of("x must be a matrix", got="shape (3,)", allowed="[tokens, hidden]",
        ...                              remedy="flatten batch and tokens first"))
        x must be a matrix: got shape (3,); allowed: [tokens, hidden]; flatten batch and tokens first.
    """

    @classmethod
    def of(cls, what: str, *, got: object, allowed: str, remedy: str) -> KernelArgumentError:
        """Build the error whose message says what was wrong, what came, what is allowed and what to do."""
        return cls(f"{what}: got {got}; allowed: {allowed}; {remedy}.")
