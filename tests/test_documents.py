"""What the documents show runs, on tiny models in the place of those that they name; their figures are current.

A page's blocks run one after the other, in one namespace and one folder. The folder holds what pages name: models,
texts, a task. Names of the Hub are folders there too, so that nothing is fetched.
"""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

import pyarrow
import pyarrow.parquet as parquet
import pytest
import torch
from docs.drawings.__main__ import drawings
from docs.drawings.floors import ordered
from sentence_transformers import SentenceTransformer
from sentence_transformers.models import Pooling, Transformer
from typer.testing import CliRunner

from embedding_data import TEXTS, beir, tsv
from slimformer.cli import app
from tiny_checkpoints import tiny_tokenizer
from tiny_models import tiny_model

ROOT = Path(__file__).parents[1]
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md"))]
_BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
# What a page says in the size that a reader wants, and what it becomes where only its working is of interest.
_SMALLER = {"steps=250": "steps=2", "length=1024": "length=32", "max_new_tokens=20": "max_new_tokens=2",
            "minutes=15": "minutes=2, prompt=64, repair=False"}  # fmt: skip
# Blocks with these words in them need a package that not every supported Python has.
_NEEDS = {"--to onnx": "onnxscript", "mteb_task": "mteb"}
# Whole pages do, whose blocks read what one of them wrote.
_PAGE_NEEDS = {"corpora.md": "ray"}
# What is added to a command of which these words are a part; the first that are count.
_ADDED = {
    "--task ": "",
    "--predictor ": "--steps 2 --length 256",
    "calibrate eliminate": "--set texts=2 --set answer=8 --set recall=false",
    "calibrate route": "--steps 2 --length 32",
    "bench ": "--prompt-tokens 32 --new-tokens 2 --repeats 1",
    "eval ": "--blocks 2 --sequence-length 32 --panel quick",
    "generate ": "--max-new-tokens 2",
    "repair ": "--steps 2 --length 32 --set panel=null",
    "optimize ": "--prompt 64 --minutes 2 --set repair=false",
}


@dataclass(frozen=True)
class Block:
    """A fenced block of a page.

    Attributes:
        line: Where its first line stands.
        language: What the fence says.
        text: What is in it.
    """

    line: int
    language: str
    text: str


def blocks(page: Path) -> list[Block]:
    text = page.read_text("utf-8")
    return [
        Block(text[: match.start(2)].count("\n") + 1, match[1], match[2]) for match in _BLOCK.finditer(text)
    ]


def pages_with_code() -> list[Path]:
    return [page for page in PAGES if blocks(page)]


def name(page: Path) -> str:
    return str(page.relative_to(ROOT))


@pytest.fixture(scope="module")
def named(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with all that pages name."""
    folder = tmp_path_factory.mktemp("reader")
    tokenizer = tiny_tokenizer()
    tokenizer.model_input_names = ["input_ids", "attention_mask"]
    tokenizer.model_max_length = 8192
    for path in ("my-model", "HuggingFaceTB/SmolLM2-135M-Instruct"):
        tiny_model("llama", num_hidden_layers=8, max_position_embeddings=8192).save_pretrained(folder / path)
        tokenizer.save_pretrained(folder / path)
    tokenizer.model_max_length = 512
    bert = tiny_model("bert", max_position_embeddings=512)
    bert.save_pretrained(folder / "my-bert")
    tokenizer.save_pretrained(folder / "my-bert")
    transformer = Transformer(str(folder / "my-bert"))
    pipeline = SentenceTransformer(modules=[transformer, Pooling(32, pooling_mode="mean")], device="cpu")
    for path in ("my-encoder", "sentence-transformers/all-MiniLM-L6-v2"):
        pipeline.save(str(folder / path))
    # Long enough that a part of it can be held out.
    (folder / "my-texts.txt").write_text("\n\n".join(" ".join(TEXTS[i:] + TEXTS[:i]) for i in range(12)))
    beir(folder / "my-beir")
    tsv(folder / "my-pairs.tsv")
    corpus = pyarrow.table({"id": [f"d{number}" for number in range(len(TEXTS))], "text": TEXTS})
    parquet.write_table(corpus, folder / "my-corpus.parquet")
    return folder


@pytest.fixture(autouse=True)
def few_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("slimformer.optimization.proposing.search._MOST", 2)


@pytest.fixture
def reader(named: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder of somebody who reads a page: what it names is there, and what it writes is new."""
    for path in named.iterdir():
        (tmp_path / path.name).symlink_to(path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("page", pages_with_code(), ids=name)
def test_every_block_of_a_page_runs(page: Path, reader: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if page.name in _PAGE_NEEDS and not find_spec(_PAGE_NEEDS[page.name]):
        pytest.skip(f"{_PAGE_NEEDS[page.name]} is not installed: make test-ray")
    torch.manual_seed(0)
    module = ModuleType(page.stem)
    # Where dataclasses look their class up.
    monkeypatch.setitem(sys.modules, page.stem, module)
    for block in blocks(page):
        needed = {package for words, package in _NEEDS.items() if words in block.text}
        if not all(map(find_spec, needed)):
            continue
        if block.language == "python":
            # Lines as on the page, for the traceback.
            code = "\n" * (block.line - 1) + smaller(block.text)
            exec(compile(code, name(page), "exec"), vars(module))
        elif block.language == "sh":
            for line in block.text.splitlines():
                run_shell(shlex.split(line, comments=True), f"{name(page)}: {line}")
        elif block.language != "text":
            pytest.fail(
                f"{name(page)}, line {block.line}: no test runs blocks of {block.language or 'no language'}"
            )


def smaller(text: str) -> str:
    for given, used in _SMALLER.items():
        text = text.replace(given, used)
    return text


def run_shell(words: list[str], shown: str) -> None:
    """One line of a shell: a command of ours is run, of others it is checked that what they are told of exists."""
    match words:
        case []:
            pass
        case ["slimformer", *arguments]:
            run_command(arguments, shown)
        case ["make", target, *_]:
            assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE), shown
        case ["pip", "install", wanted]:
            asked = set(re.findall(r"[\w-]+", wanted.strip(".")))
            extras = re.search(
                r"\[project.optional-dependencies\]\n(.*?)\n\[",
                (ROOT / "pyproject.toml").read_text("utf-8"),
                re.DOTALL,
            )
            assert extras is not None
            assert asked <= set(re.findall(r"^([\w-]+) = ", extras[1], re.MULTILINE)), shown
        case ["python", "-m", module, *_] | ["pytest", module]:
            assert (ROOT / module.replace(".", "/")).is_dir(), shown
        case _:
            pytest.fail(f"no test knows the command of {shown}")


def run_command(arguments: list[str], shown: str) -> None:
    line = " ".join(arguments) + " "
    added = next((more for words, more in _ADDED.items() if words in line), "")
    result = CliRunner().invoke(app, [*arguments, *added.split()])
    # Two steps may win nothing back, and of a tiny model nothing may fit: no errors.
    fine = (0, 4) if arguments[0] in ("optimize", "repair") else (0,)
    assert result.exit_code in fine, f"{shown}\n{result.output}"


def test_drawings_are_those_of_the_results_and_of_the_floors() -> None:
    stale = [
        file for file, made in drawings().items() if (ROOT / "docs/assets" / file).read_text("utf-8") != made
    ]
    assert stale == [], "run python -m docs.drawings"


def test_every_floor_is_a_folder_or_a_module_of_the_library() -> None:
    found = {path.stem for path in (ROOT / "src/slimformer").iterdir() if path.suffix in ("", ".py")}
    assert set(ordered()) == found - {"__init__", "__pycache__"}


def answers() -> dict[str, list[str]]:
    """The steps that answer each question of the architecture's page."""
    sections = (ROOT / "docs/architecture.md").read_text("utf-8").split("\n## ")[1:]
    titled = dict(section.split("\n", 1) for section in sections)
    return {
        title: [
            " ".join(step.split())
            for step in re.split(r"^\d\. ", text.strip().split("\n\n")[0], flags=re.MULTILINE)[1:]
        ]
        for title, text in titled.items()
        if title.endswith("?")
    }


def test_five_questions_are_answered_by_three_files_each() -> None:
    assert len(answers()) == 5
    assert {len(steps) for steps in answers().values()} == {3}


@pytest.mark.parametrize("question", answers())
def test_an_answer_names_files_and_what_stands_in_them(question: str) -> None:
    for step in answers()[question]:
        spans = re.findall(r"`([^`]+)`", step)
        files = [file_named(span) for span in spans if span.endswith(".py")]
        # What is said of your own file is in none of ours.
        if not files:
            assert step.startswith("Your own file"), step
            continue
        text = "".join(file.read_text("utf-8") for file in files)
        names = [span for span in spans if re.fullmatch(r"[\w.]+", span) and not span.endswith(".py")]
        assert [name for span in names for name in span.split(".") if name not in text] == [], step


def file_named(span: str) -> Path:
    return next(path for path in (ROOT / "src/slimformer" / span, ROOT / span) if path.exists())


def test_the_readme_fits_and_counts_the_models_that_the_page_lists() -> None:
    lines = (ROOT / "README.md").read_text("utf-8").splitlines()
    assert len(lines) <= 150
    page = (ROOT / "docs/supported_models.md").read_text("utf-8")
    rows = re.findall(r"^\| (?:de|en)coders \|([\d |]+)\|$", page, re.MULTILINE)
    counts = [[int(number) for number in row.split("|")] for row in rows]
    first, second, _, _, every = (sum(column) for column in zip(*counts, strict=True))
    said = re.search(r"(\d+) of the (\d+) text .*?In (\d+) of them .*?; in (\d+) whole", " ".join(lines))
    assert said is not None
    assert [int(number) for number in said.groups()] == [
        first + second,
        every,
        first,
        second,
    ]


def links(page: Path) -> Iterator[str]:
    text = re.sub(_BLOCK, "", page.read_text("utf-8"))
    yield from re.findall(r"\]\(([^)\s]+)\)", text)
    yield from re.findall(r'(?:src|srcset)="([^"]+)"', text)


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_every_link_to_a_file_leads_to_one(page: Path) -> None:
    for link in links(page):
        target, _, anchor = link.partition("#")
        if "://" in link or not target:
            continue
        file = page.parent / target
        assert file.exists(), link
        if anchor and file.suffix == ".md":
            headings = re.findall(r"^#+ (.*)$", file.read_text("utf-8"), re.MULTILINE)
            assert anchor in {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings}, link
