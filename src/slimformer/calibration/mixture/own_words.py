"""Text that the dense model writes by itself: questions and answers where it chats, else text from a first word on.

A chat model that is given the beginning of a user's turn writes what users ask, and behind a system prompt what they
ask about that (Magpie, arXiv 2406.08464). Any model goes on from a random word with text like that it was trained on
(LLM-QAT, arXiv 2305.17888). The prompts that the panel judges by are not read, so that it judges what was not trained
on.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from slimformer.errors import CalibrationError, DataError
from slimformer.evaluation.panel.capabilities.own_words import model_digest
from slimformer.evaluation.panel.capabilities.prompts import prompt_ids
from slimformer.evaluation.perplexity import evaluating
from slimformer.methods.layer_drop import LayerDrop
from slimformer.patching import patched
from slimformer.text.progress import Stages

# A step of so many texts takes a GPU little longer than one of few: it waits for the CPU.
_AT_ONCE = {"cuda": 1024}
_LEAST_AT_ONCE = 16
# Tokens that a text is expected to have, so that no more texts are begun than are wanted.
_EXPECTED = 128
_QUESTION, _ANSWER = 64, 512
# One batch in so many is text without a question, also of models that chat.
_FREE = 4
# The rarest tokens are left out, from which small models do not find back (arXiv 2407.01082): without sorting a
# vocabulary, as a nucleus would be found.
_MIN_P = 0.02
# What a model is told that is then asked; None is what its template says by itself. By themselves models ask about
# what they were tuned on most, and a plan is judged by the rest, too.
_SUBJECTS = (
    None,
    "You solve word problems in mathematics, and write down every step of the calculation.",
    "You answer questions of general knowledge and of common sense in everyday life.",
    "You write, explain and mend computer programs.",
    "You read what is given to you, and summarise it, rewrite it, translate it, or find something in it.",
)
_MARK = "slimformer"
# So many batches without a single text end the writing.
_EMPTY = 4


@dataclass
class Writer:
    """Writes text with a model, batch by batch; asked for as much, the same seed gives the same batches.

    Several processes of one training write batches in turn, and have all of them in the end.

    Attributes:
        model: The dense model.
        tokenizer: Its tokenizer.
        longest: Most tokens of a text.
        words: Tokens that a text may begin with.
        front: What the tokenizer puts before a text.
        seed: Decides what is written.
        cache: A folder in which it is kept for the next time; None keeps nothing.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    longest: int
    words: Sequence[int]
    front: Sequence[int]
    seed: int = 0
    cache: str | os.PathLike[str] | None = None
    texts: list[list[int]] = field(default_factory=list, init=False)
    batches: int = field(default=0, init=False)
    at_once: int = field(default=_LEAST_AT_ONCE, init=False)

    def written(
        self, tokens: int, seconds: float = math.inf, stages: Stages | None = None
    ) -> list[list[int]]:
        """Texts of so many tokens in all, or as many as there is time for; one batch at least.

        Raises:
            CalibrationError: If the model writes nothing.
            DataError: If its chat template fails, or the folder cannot be written.
        """
        openings = self._openings()
        self._read()
        until, empty = time.monotonic() + seconds, 0
        rank, processes = _processes()
        tokens = math.ceil(tokens / processes)
        most = max(_AT_ONCE.get(self.model.device.type, 0), _LEAST_AT_ONCE)
        self.at_once = min(max(math.ceil(tokens / _EXPECTED), _LEAST_AT_ONCE), most)
        move = None if stages is None else stages.advance("own words")
        try:
            while not self.texts or (sum(map(len, self.texts)) < tokens and time.monotonic() < until):
                found = self._batch(openings, self.batches * processes + rank)
                empty = 0 if found else empty + 1
                if empty == _EMPTY:
                    raise CalibrationError(
                        "The model writes nothing: it ends every text with its first token. Give text as data."
                    )
                self.texts += found
                self.batches += 1
                if move is not None:
                    each = max(sum(map(len, self.texts)) // self.batches, 1)
                    move(math.ceil(tokens / each))
        finally:
            self._write()
        if processes == 1:
            return self.texts
        parts: list[Any] = [None] * processes
        torch.distributed.all_gather_object(parts, self.texts)
        return [text for part in parts for text in part]

    def _batch(self, openings: list[list[int]], number: int) -> list[list[int]]:
        device = self.model.device
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            torch.manual_seed(self.seed * 1_000_003 + number)
            size = self.at_once
            while True:
                try:
                    return self._texts(size, [] if number % _FREE == _FREE - 1 else openings)
                except torch.OutOfMemoryError:
                    if size == 1:
                        raise
                    size //= 2

    def _texts(self, size: int, openings: list[list[int]]) -> list[list[int]]:
        if not openings:
            drawn = torch.randint(len(self.words), (size,)).tolist()
            begun = [[*self.front, self.words[word]] for word in drawn]
        else:
            room = max(min(_QUESTION, self.longest // 4), 1)
            asked = self._continued([openings[row % len(openings)] for row in range(size)], room)
            questions = [self.tokenizer.decode(ids, skip_special_tokens=True).strip() for ids in asked]
            begun = [prompt_ids(self.tokenizer, question, None) for question in questions if question]
        # Half of a row at least is what the model says.
        begun = [ids for ids in begun if len(ids) <= self.longest // 2]
        if not begun:
            return []
        answers = self._continued(begun, min(_ANSWER, self.longest // 2))
        return [ids + answer for ids, answer in zip(begun, answers, strict=True)]

    def _continued(self, prompts: list[list[int]], new_tokens: int) -> list[list[int]]:
        device, longest = self.model.device, max(map(len, prompts))
        ids = torch.tensor([[0] * (longest - len(row)) + row for row in prompts], device=device)
        mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in prompts], device=device)
        ends = _ends(self.model)
        # Patched with nothing dropped it writes the same, and faster.
        with evaluating(self.model), patched(self.model, LayerDrop()):
            found = self.model.generate(
                ids,
                attention_mask=mask,
                max_new_tokens=new_tokens,
                do_sample=True,
                temperature=1.0,
                min_p=_MIN_P,
                top_p=1.0,
                top_k=0,
                # Drawing from NaN ends the process on a GPU; a model that computes it is refused where it is judged.
                remove_invalid_values=True,
                pad_token_id=ends[0] if ends else 0,
            )
        rows = found[:, longest:].tolist()
        stops = [next((place for place, token in enumerate(row) if token in ends), len(row)) for row in rows]
        return [row[: stop + 1] for row, stop in zip(rows, stops, strict=True)]

    def _openings(self) -> list[list[int]]:
        """Beginnings of a user's turn, one for each subject; none where the model does not chat."""
        if getattr(self.tokenizer, "chat_template", None) is None:
            return []
        prompt_ids(self.tokenizer, _MARK, None)  # says what is wrong with the template, if anything is
        found = []
        for subject in _SUBJECTS:
            system = [] if subject is None else [{"role": "system", "content": subject}]
            opening = self._opening([*system, {"role": "user", "content": _MARK}])
            if opening and opening not in found:
                found.append(opening)
        return found

    def _opening(self, messages: list[dict[str, str]]) -> list[int]:
        """What a template writes in front of the mark; nothing where it does not take such messages."""
        try:
            whole = self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        # A template can fail in any way that a program can, and many do on what a system says.
        except Exception:
            return []
        opening, found, _ = str(whole).partition(_MARK)
        if not (found and opening):
            return []
        ids = self.tokenizer(opening, add_special_tokens=False, verbose=False)["input_ids"]
        return [int(token) for token in ids]

    def _file(self) -> Path | None:
        if self.cache is None:
            return None
        rank, processes = _processes()
        part = f"-{rank + 1}-of-{processes}" if processes > 1 else ""
        return Path(self.cache) / f"written-{model_digest(self.model)}-{self.longest}-{self.seed}{part}.json"

    def _read(self) -> None:
        file, size = self._file(), self.model.get_input_embeddings().num_embeddings
        if file is None:
            return
        try:
            content: Any = json.loads(file.read_text(encoding="utf-8"))
            texts, batches = content["texts"], int(content["batches"])
            if all(isinstance(token, int) and 0 <= token < size for text in texts for token in text):
                self.texts, self.batches = [list(text) for text in texts if text], batches
        except (OSError, ValueError, LookupError, TypeError, RecursionError):
            return  # none, or one cut short: it is written anew

    def _write(self) -> None:
        file, temporary = self._file(), ""
        if file is None or not self.texts:
            return
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            handle, temporary = tempfile.mkstemp(dir=file.parent, prefix=".written-")
            with os.fdopen(handle, "w", encoding="utf-8") as opened:
                json.dump({"batches": self.batches, "texts": self.texts}, opened)
            os.replace(temporary, file)
        except OSError as error:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
            raise DataError(
                f"What the dense model wrote cannot be kept in {file.parent}: {error}. Give another folder, or none."
            ) from error


def _processes() -> tuple[int, int]:
    """The number of this process, and how many there are."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    return 0, 1


def _ends(model: PreTrainedModel) -> list[int]:
    config: Any = model.generation_config
    found = config.eos_token_id if config is not None else None
    return [] if found is None else [found] if isinstance(found, int) else list(found)
