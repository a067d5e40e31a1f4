"""No text model class of transformers is wrong under a patch: it is right in the tier that is claimed, or refused."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import transformers

from sweep.outcomes import outcome_of
from sweep.run import every
from sweep.table import TIERS

# One class of every structure, and those whose arithmetic has misled a check before.
CHOSEN = (
    "llama", "phi3", "phi", "gemma2", "gemma3_text", "olmo2", "gpt2", "gpt_neox", "cohere", "mixtral", "gpt_oss", "glm",
    "helium", "ernie4_5", "smollm3", "ministral3", "qwen3_vl_text", "qwen3_next", "granitemoehybrid", "llama4_text",
    "gemma4_text", "deepseek_v3", "mamba2", "falcon", "bert", "distilbert", "modernbert", "t5", "deberta-v2",
    "nomic_bert", "gte",
)  # fmt: skip


PAGE = Path(__file__).parents[2] / "docs" / "supported_models.md"
VERSION = re.compile(r"transformers (\d\S*),")
ROW = re.compile(r"^\| (\S[^|]*) \| \w+ \| ([^|]+) \|", re.MULTILINE)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Matrices this small only wait for a second thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    full = metafunc.config.getoption("--full", default=False)
    names = list(every()) if full else [name for name in CHOSEN if name in every()]
    metafunc.parametrize("name", names)


def test_a_model_is_right_in_the_tier_it_claims_or_refused(name: str) -> None:
    result = outcome_of(every()[name])
    if result.outcome == "cannot be built":
        pytest.skip(result.detail)
    assert result.outcome in ("rows", "sublayers", "refused"), result.detail
    page = PAGE.read_text()
    if VERSION.findall(page)[:1] == [transformers.__version__]:
        written = dict(ROW.findall(page))
        assert written.get(name) == TIERS[result.outcome], (
            "python -m sweep --output and sweep.table write the page"
        )
