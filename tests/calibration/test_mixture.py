"""A mixture of sources: each counts as much as was asked for, and what the model writes is written once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.tiny_checkpoints import tiny_tokenizer
from tests.tiny_models import tiny_model
from tests.training.test_training import TEXTS
from torch import Tensor

from slimformer.calibration.mixture.own_words import Writer
from slimformer.calibration.mixture.rows import Mixture, copies, mixture_rows, mixture_texts
from slimformer.calibration.mixture.sources import DEFAULT, sources_of, weighted
from slimformer.errors import DataError

TEMPLATE = (
    "{% for message in messages %}[{{ message['role'] }}] {{ message['content'] }}\n{% endfor %}[assistant]"
)


def mixed(data: Any, **options: Any) -> Mixture:
    given: dict[str, Any] = {"text_field": "text", "hold_out": True, "tokens": 32, "count": 20, "held_out": 6}
    return mixture_rows(tiny_model("llama"), tiny_tokenizer(), sources_of(data), **{**given, **options})


def writer(cache: Path | None = None, seed: int = 0, template: str | None = None) -> Writer:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    return Writer(tiny_model("llama"), tokenizer, 48, range(5, 40), [1], seed, cache)


def test_every_source_has_the_share_that_was_asked_for(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("\n\n".join(TEXTS))
    found = mixed({tmp_path / "mine.txt": 3, "copying": 1})
    assert found.read.shape == (20, 32)
    assert {name: part["share"] for name, part in found.record.items()} == {"mine.txt": 0.75, "copying": 0.25}
    repeated = [row for row in found.read if _repeats(row)]
    assert len(repeated) == 5
    # Two rows of the smallest source, so that it is not judged by one alone.
    assert found.of.count("copying") == 2
    batches, names = found.batches(1)
    assert [len(batch) for batch in batches] == [1] * len(found.of)
    assert names == found.of


def _repeats(row: Tensor) -> bool:
    ids = row.tolist()
    return any(ids[-8:] == ids[at : at + 8] for at in range(len(ids) - 8))


def test_the_default_is_what_the_model_writes_text_and_sequences_that_repeat() -> None:
    assert sum(source.share for source in sources_of(None)) == pytest.approx(1.0)
    assert [source.data for source in sources_of(None)] == list(DEFAULT)
    found = mixed(None)
    assert list(found.record) == ["own-words", "built-in", "copying"]
    assert len(found.read) == 20
    assert "the dense model" in found.record["own-words"]["from"]


def test_copies_come_again_and_again() -> None:
    rows = copies(range(10, 60), [1], tokens=65, count=6, seed=0)
    assert rows.shape == (6, 65)
    for row in rows[::2, 1:]:
        gap = next(gap for gap in range(16, 33) if torch.equal(row[gap:], row[:-gap]))
        assert len(set(row[:gap].tolist())) > 4
    assert torch.equal(rows, copies(range(10, 60), [1], tokens=65, count=6, seed=0))
    assert not torch.equal(rows, copies(range(10, 60), [1], tokens=65, count=6, seed=1))


def test_sequences_that_are_looked_up_come_in_another_order() -> None:
    rows = copies(range(10, 10_000), [1], tokens=257, count=8, seed=0)[1::2, 1:].view(4, 16, 16)
    first, again = rows[:, :8], rows[:, 8:]
    for one, other in zip(first.tolist(), again.tolist(), strict=True):
        assert sorted(one) == sorted(other)
        assert one != other


def test_what_the_model_writes_is_kept_and_gone_on_from(tmp_path: Path) -> None:
    first = writer(tmp_path).written(200)
    assert sum(map(len, first)) >= 200
    assert all(text[0] == 1 and len(text) <= 48 for text in first)
    kept = writer(tmp_path)
    assert kept.written(200) == first
    longer = kept.written(sum(map(len, first)) + 1)
    assert longer[: len(first)] == first
    # As it would have been at once.
    assert writer().written(sum(map(len, first)) + 1) == longer
    assert writer(tmp_path, seed=1).written(200) != first
    (file,) = tmp_path.glob("*-0.json")
    file.write_text("{")
    assert writer(tmp_path).written(200) == first


def _in_a_process(rank: int, folder: Path) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    (folder / f"{rank}.json").write_text(json.dumps(writer().written(1)))
    torch.distributed.destroy_process_group()


def test_two_processes_write_what_one_does(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(_in_a_process, (tmp_path,), nprocs=2)
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    assert first == second
    one = writer()
    # A batch of each process.
    while one.batches < 2:
        one.written(sum(map(len, one.texts)) + 1)
    assert first == one.texts


def test_time_that_is_over_ends_the_writing() -> None:
    few = writer()
    few.written(10**9, seconds=0.0)
    assert few.batches == 1


def test_a_model_that_chats_is_asked_what_it_would_be_asked() -> None:
    chatting = writer(template=TEMPLATE)
    texts = chatting.written(1)
    lead = chatting.tokenizer("[user] ", add_special_tokens=False)["input_ids"]
    for text in texts:
        assert [token for token in text if token != 1][: len(lead)] == lead


def test_a_chat_template_that_fails_is_said() -> None:
    with pytest.raises(DataError, match="chat template fails"):
        writer(template="{{ messages[9].content.nothing }}").written(1)


@pytest.mark.parametrize("weight", ["two", 0, -1, float("nan"), float("inf"), True, None])
def test_weights_that_are_no_numbers_are_refused(weight: Any) -> None:
    with pytest.raises(DataError, match=r"The weight of 'a\.txt' is .* a number above 0"):
        sources_of({"a.txt": weight})


def test_sources_that_are_none_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no source"):
        sources_of({})
    with pytest.raises(DataError, match="is a name or a path"):
        sources_of({3: 1.0})
    with pytest.raises(DataError, match="'own-words' is for decoders"):
        sources_of({"own-words": 1}, decoder=False)
    (tmp_path / "empty.txt").write_text("\n\n")
    with pytest.raises(DataError, match=r"empty\.txt holds no text"):
        mixed({tmp_path / "empty.txt": 1, "copying": 1})


def test_sources_as_they_are_typed(tmp_path: Path) -> None:
    assert weighted([]) is None
    assert weighted(["a.txt"]) == "a.txt"
    assert weighted(["a.txt=2", "own-words"]) == {"a.txt": 2.0, "own-words": 1.0}
    odd = tmp_path / "a=b.txt"
    odd.write_text("text")
    assert weighted([str(odd), "c.txt"]) == {str(odd): 1.0, "c.txt": 1.0}
    with pytest.raises(DataError, match=r"The weight of 'a\.txt' is 'two'"):
        weighted(["a.txt=two"])
    with pytest.raises(DataError, match="given twice"):
        weighted(["a.txt", "a.txt=2"])


def test_texts_for_encoders_are_padded_to_one_length(tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("\n\n".join(text[:20] for text in TEXTS))
    (tmp_path / "long.txt").write_text("\n\n".join(TEXTS))
    sources = sources_of({tmp_path / "short.txt": 1, tmp_path / "long.txt": 1}, decoder=False)
    found = mixture_texts(
        tiny_tokenizer(), sources, text_field="text", hold_out=True, tokens=32, count=12, held_out=4
    )
    assert found.read.shape == (12, 2, 32)
    lengths = found.read[:, 1].sum(1)
    assert lengths[:6].max() < lengths[6:].min()
    batches, names = found.batches(2)
    assert names == ["short.txt", "long.txt"]
    assert all(batch.shape[1:] == (2, 32) for batch in batches)
