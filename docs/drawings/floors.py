"""The floors of the house: what `[tool.importlinter]` in pyproject.toml orders, with the question of each."""

from __future__ import annotations

import ast
import re
from pathlib import Path

from docs.drawings.canvas import drawing, path, text

_ROOT = Path(__file__).parents[2]
_LEFT, _WIDTH, _ROW = 26.0, 450.0, 44.0
# As many characters as a row is wide.
_MOST = 70


def floors(theme: str) -> str:
    """The drawing, the highest floor on top."""
    names = ordered()
    bottom = 28 + _ROW * len(names)
    parts = [
        text(_LEFT, 16, "A folder imports from folders below it, never from above.", "ink"),
        path([(10, 32), (10, bottom - 6)], "arrow"),
        path([(4, bottom - 14), (10, bottom - 6), (16, bottom - 14)], "arrow"),
    ]
    for number, name in enumerate(names):
        y = 28 + _ROW * number
        parts.append(
            f'<rect class="line" x="{_LEFT}" y="{y:.1f}" width="{_WIDTH}" height="{_ROW - 6}" rx="6"/>'
        )
        parts.append(text(_LEFT + 12, y + 17, name, "code"))
        parts.append(text(_LEFT + 12, y + 32, _answered(name), "small"))
    label = f"Floors from the top: {', '.join(names)}. Each imports only from those below it."
    return drawing(theme, _LEFT + _WIDTH + 4, bottom + 4, label, parts)


def ordered() -> list[str]:
    """The floors as import-linter keeps them, the highest first."""
    # Python 3.10 reads no TOML by itself, and this one list needs no more than its lines.
    configured = (_ROOT / "pyproject.toml").read_text("utf-8").partition("[tool.importlinter]")[2]
    listed = re.search(r"^layers = \[\n(.*?)^\]", configured, re.DOTALL | re.MULTILINE)
    if listed is None:
        raise ValueError("pyproject.toml has no list of layers under [tool.importlinter]")
    return re.findall(r'"(\w+)"', listed[1])


def _answered(name: str) -> str:
    """What a folder says of itself: the first line of its docstring, to its first comma or colon where it is long."""
    folder = _ROOT / "src" / "slimformer" / name
    file = folder / "__init__.py" if folder.is_dir() else folder.with_suffix(".py")
    line = (ast.get_docstring(ast.parse(file.read_text("utf-8"))) or "").partition("\n")[0]
    line = line.replace("`", "").rstrip(".")
    return line if len(line) <= _MOST else re.split("[,:;]", line)[0]
