"""Which versions of transformers slimformer has been tried on."""

from __future__ import annotations

import warnings

import transformers
from packaging.version import Version

from slimformer.errors import SlimformerWarning

# The newest release on which every text model class was compared with itself, patched and unpatched.
NEWEST_SWEPT = "5.24.0"
_warned: list[str] = []


def warn_if_untried() -> None:
    """Say once per process that the installed transformers is newer than the newest that was tried."""
    installed = transformers.__version__
    if installed in _warned or Version(Version(installed).base_version) <= Version(NEWEST_SWEPT):
        return
    _warned.append(installed)
    warnings.warn(
        f"transformers {installed} is newer than {NEWEST_SWEPT}, the newest that slimformer was tried on. What it does "
        "not recognise it refuses, but a change that leaves names as they were could go unnoticed: compare outputs "
        "with and without the patch, or look for a newer slimformer.",
        SlimformerWarning,
        stacklevel=3,
    )
