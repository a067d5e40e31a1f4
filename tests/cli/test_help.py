"""Every help fits one screen and ends with an example; the bare command says which one serves which wish."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from slimformer.cli import app

COLUMNS, LINES = 100, 40
GROUP: Any = typer.main.get_command(app)
CHOICES = ("drop", "narrow", "exit", "eliminate", "temperature", "route", "draft")
COMMANDS = (
    "calibrate", "optimize", "repair", "eval", "bench", "generate", "export", "embed", "show", "demo",
)  # fmt: skip
EVERY = [(), *((name,) for name in COMMANDS), *(("calibrate", name) for name in CHOICES)]


def test_these_are_all_commands_that_are_shown() -> None:
    assert {name for name, command in GROUP.commands.items() if not command.hidden} == set(COMMANDS)
    assert tuple(GROUP.commands["calibrate"].commands) == CHOICES


@pytest.mark.parametrize("command", EVERY, ids=" ".join)
def test_every_help_fits_one_screen_and_ends_with_an_example(command: tuple[str, ...]) -> None:
    shown = CliRunner().invoke(app, [*command, "--help"], env={"COLUMNS": str(COLUMNS), "TERM": "dumb"})
    assert shown.exit_code == 0
    lines = shown.stdout.splitlines()
    assert len(lines) <= LINES
    assert max(map(len, lines)) <= COLUMNS
    said = " ".join(" ".join(lines).split()).rpartition("Example: ")
    assert said[2].startswith(" ".join(("slimformer", *command)))
    assert "\u2502" not in said[2]


def test_the_list_of_commands_begins_with_the_one_to_begin_with() -> None:
    shown = CliRunner().invoke(app, ["--help"], env={"COLUMNS": str(COLUMNS), "TERM": "dumb"}).stdout
    found = [word for line in shown.splitlines() for word in line.split()[1:2] if word in COMMANDS]
    assert found[0] == "calibrate"
    assert sorted(found) == sorted(COMMANDS)


def test_the_lines_of_a_help_break_where_the_terminal_ends() -> None:
    shown = CliRunner().invoke(app, ["repair", "--help"], env={"COLUMNS": "80", "TERM": "dumb"}).stdout
    body = shown.partition("The checkpoint stays")[2].partition("\u256d")[0]
    lines = [line.strip() for line in body.strip().splitlines()]
    firsts = [after.split()[0] for after in lines[1:]]
    # No line ends where the first word of the next would have fitted.
    assert all(len(line) + len(" " + first) > 76 for line, first in zip(lines[1:-1], firsts[1:], strict=True))


@pytest.mark.parametrize("name", CHOICES)
def test_each_choice_has_at_most_twelve_options(name: str) -> None:
    parameters = GROUP.commands["calibrate"].commands[name].params
    assert sum(parameter.param_type_name == "option" for parameter in parameters) <= 12


def test_the_bare_command_says_which_command_serves_which_wish() -> None:
    said = CliRunner().invoke(app, [])
    assert said.exit_code == 0
    lines = said.stdout.splitlines()
    assert len(lines) <= LINES
    assert max(map(len, lines)) <= COLUMNS
    wishes = (
        "faster generation",
        "long prompts",
        "faster embeddings",
        "less memory",
        "longer context",
        "undo",
    )
    assert [sum(line.strip().startswith(wish) for line in lines) for wish in wishes] == [1] * 6
    for line in lines:
        words = line.strip().partition("slimformer calibrate ")[2].split()
        if words:
            command = GROUP.commands["calibrate"].commands[words[0]]
            assert {word for word in words if word.startswith("-")} <= {
                option for parameter in command.params for option in parameter.opts
            }


@pytest.mark.parametrize(("typed", "expected"), [
    ("slimformer calibrate ", set(CHOICES)),
    ("slimformer calibrate drop --max", {"--max-loss"}),
    ("slimformer re", {"repair"}),
])  # fmt: skip
def test_the_shell_completes_commands_and_options(typed: str, expected: set[str]) -> None:
    words = typed.split(" ")
    environment = {
        "_SLIMFORMER_COMPLETE": "complete_bash",
        "COMP_WORDS": typed,
        "COMP_CWORD": str(len(words) - 1),
    }
    program = "import sys; sys.argv[0] = 'slimformer'; from slimformer.cli import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path), **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert set(done.stdout.split()) == expected, done.stderr
