"""For mkdocstrings: `Example:` in a docstring is a section of examples, as `Examples:` is."""

from __future__ import annotations

from typing import Any

from griffe import Extension, Object


class SingularExample(Extension):
    """Renames the section before it is read."""

    def on_object(self, *, obj: Object, **kwargs: Any) -> None:
        """Called for every object whose members are known."""
        if obj.docstring is not None:
            obj.docstring.value = obj.docstring.value.replace("\nExample:\n", "\nExamples:\n")
