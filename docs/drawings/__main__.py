"""`python -m docs.drawings [--check]`: draw all, or say which are stale."""

from __future__ import annotations

import sys
from pathlib import Path

from docs.drawings.canvas import THEMES
from docs.drawings.floors import floors
from docs.drawings.speed_and_quality import speed_and_quality

_ASSETS = Path(__file__).parents[1] / "assets"


def drawings() -> dict[str, str]:
    """Every drawing by the name of its file."""
    made = {"speed_and_quality": speed_and_quality, "floors": floors}
    return {f"{name}-{theme}.svg": draw(theme) for name, draw in made.items() for theme in THEMES}


def main(check: bool) -> int:
    """Write the files, or with `check` exit with 1 where one is not as it would be drawn now."""
    stale = 0
    for name, content in drawings().items():
        file = _ASSETS / name
        if file.exists() and file.read_text("utf-8") == content:
            continue
        stale += 1
        if not check:
            file.write_text(content, encoding="utf-8")
        print(f"{name}: {'stale, run python -m docs.drawings' if check else 'drawn'}")
    return int(check and stale > 0)


if __name__ == "__main__":
    sys.exit(main("--check" in sys.argv[1:]))
