"""Errors that users meet: each says what was wrong, what came, what is allowed and what to do."""

from __future__ import annotations


class SlimformerError(Exception):
    """Root of every error slimformer raises on purpose.

    Example:
        >>> from slimformer.errors import PlanError, SlimformerError
        >>> issubclass(PlanError, SlimformerError)
        True
    """


class UnsupportedModelError(SlimformerError):
    """The model has a structure that no row of the structure table describes."""


class PlanError(SlimformerError):
    """A plan that cannot be read, written, or applied to this model."""


class DataError(SlimformerError):
    """Text or tokens that cannot be used: absent, empty, too short, of the wrong type."""


class CalibrationError(SlimformerError):
    """Calibration that cannot go on, such as NaN logits or a target nothing can reach."""


class ExportError(SlimformerError):
    """A checkpoint that cannot be exported, or a format that cannot hold a plan."""


class SlimformerWarning(UserWarning):
    """Something the user should know and that does not change results."""
