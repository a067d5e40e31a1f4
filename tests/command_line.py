"""Run the command line as a user does, in this process."""

from __future__ import annotations

from typer.testing import CliRunner, Result

from slimformer.cli import app


def run(*arguments: object, code: int = 0, typed: str | None = None) -> Result:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], input=typed)
    assert result.exit_code == code, result.output
    assert "Traceback" not in result.output
    return result


def refused(*arguments: object) -> str:
    """The one line that a refused command prints."""
    result = run(*arguments, code=1)
    assert result.stdout == ""
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith("error: ")
    return last


def wrong(*arguments: object) -> str:
    """What is said of wrong usage, without the frame around it."""
    text = run(*arguments, code=2).stderr
    return " ".join(text.replace("\u2502", " ").replace("|", " ").split())
