"""What a decoder is judged by: one method for every capability, each with the reason where there is none."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from slimformer.errors import DataError
from slimformer.evaluation.panel.builtin import builtin_prompts, builtin_texts, drawable_tokens
from slimformer.evaluation.panel.capabilities import copying, reasoning, retrieval
from slimformer.evaluation.panel.capabilities.own_words import own_words
from slimformer.evaluation.panel.capabilities.predictions import Likelihoods, Predictions
from slimformer.evaluation.panel.capabilities.prompts import prompt_ids
from slimformer.evaluation.panel.capabilities.reading import Row
from slimformer.evaluation.panel.capabilities.text import text_rows
from slimformer.evaluation.panel.capabilities.yours import Judging, Matches, Prompt
from slimformer.evaluation.panel.capability import Capability
from slimformer.evaluation.panel.sizes import Sizes
from slimformer.evaluation.readable import longest
from slimformer.model.anatomy import find_anatomy

NAMES = ("text", "own words", "copying", "retrieval", "reasoning", "yours")
_ANSWER = 256


@dataclass
class DecoderCapabilities:
    """Makes the rows of every capability and runs the dense model over them.

    Attributes:
        model: The dense model.
        tokenizer: Its tokenizer.
        sizes: How much is read.
        seed: What is drawn.
        chat: See `prompt_ids`.
        cache: Where own words are kept.
        tokens_at_once: See `read`.
        record: What a plan's record says of what was made.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    sizes: Sizes
    seed: int
    chat: bool | None
    cache: str | os.PathLike[str] | None
    tokens_at_once: int | None
    record: dict[str, Any] = field(default_factory=dict)

    @cached_property
    def longest(self) -> int:
        """Most tokens that the model reads."""
        return longest(find_anatomy(self.model), self.tokenizer)

    @cached_property
    def front(self) -> list[int]:
        """What the tokenizer puts before a text, such as `<bos>`; `<bos>` also where it leaves that to the model."""
        ids = self.tokenizer("a", add_special_tokens=True)["input_ids"]
        alone = self.tokenizer("a", add_special_tokens=False)["input_ids"]
        return [int(token) for token in ids[: len(ids) - len(alone)]] if ids[-len(alone) :] == alone else []

    @cached_property
    def drawable(self) -> list[int]:
        """Every token of the built-in texts once."""
        return drawable_tokens(self.tokenizer)

    @cached_property
    def filler(self) -> list[int]:
        """Tokens of text for between what is looked for."""
        texts = builtin_texts()
        whole = "\n\n".join(text for kind in ("prose", "dialogue") for text in texts[kind])
        return self._ids(whole)

    def text(self, texts: Sequence[str] | None) -> Capability:
        """The user's texts, or those built in."""
        of = builtin_texts() if texts is None else {"": list(texts)}
        tokens = min(self.sizes.text_tokens, self.longest)
        rows = text_rows(of, self.tokenizer, count=self.sizes.text_rows, tokens=tokens, seed=self.seed)
        return self._predictions("text", rows)

    def own_words(self) -> Capability | str:
        """What the dense model writes."""
        # A model without a template is to answer, and not to go on with the question.
        end = "" if self._chats else "\n"
        prompts = [(kind, text + end) for kind, text in builtin_prompts()[: self.sizes.prompts]]
        rows = self._written(prompts, self.sizes.new_tokens, "own_words")
        return rows if isinstance(rows, str) else self._predictions("own words", rows)

    def copying(self) -> Capability | str:
        """Random sequences that come a second time."""
        sizes = self.sizes
        rows, chance = copying.copying_rows(
            self.drawable,
            self.front,
            self.filler,
            count=sizes.copies,
            tokens=sizes.copy_tokens,
            gaps=sizes.gaps,
            far=sizes.far_copies,
            longest=self.longest,
            seed=self.seed,
        )
        found = Likelihoods.recorded("copying", self.model, rows, chance, self.seed, self.tokens_at_once)
        kept = [row.group for row in rows if found.probability(row.group) >= copying.LEAST]
        if copying.AT_ONCE not in kept:
            return (
                "the dense model itself does not copy: it gives a repeated token a probability of "
                f"{found.probability(copying.AT_ONCE):.2g}, and copying is judged from {copying.LEAST:g} on"
            )
        chosen = [index for index, row in enumerate(rows) if row.group in kept]
        rows = [rows[index] for index in chosen]
        return Likelihoods("copying", rows, found.dense[chosen], chance, self.seed, self.tokens_at_once)

    def retrieval(self, lengths: Sequence[int] | None) -> Capability | str:
        """Keys in long prompts.

        Raises:
            DataError: If a length is asked for that the model cannot read.
        """
        asked = self.sizes.lengths if lengths is None else lengths
        too_long = [length for length in lengths or () if not 1 <= length <= self.longest]
        if too_long:
            raise DataError(
                f"Keys are to be looked for in prompts of {too_long[0]} tokens, and the model reads 1 to "
                f"{self.longest}. Give other lengths."
            )
        fitting = list(dict.fromkeys(min(length, self.longest) for length in asked))
        prompts = retrieval.retrieval_prompts(
            self.tokenizer, self.front, self.filler, lengths=fitting, count=self.sizes.keys, seed=self.seed
        )
        if not prompts:
            return (
                f"{max(fitting)} tokens are too few for the keys, or the tokenizer has no tokens for digits"
            )
        found = retrieval.Retrieval.recorded("retrieval", self.model, prompts, self.seed, self.tokens_at_once)
        kept = [
            index for index, one in enumerate(prompts) if found.certainty(one.row.group) >= retrieval.LEAST
        ]
        if not kept:
            return (
                "the dense model itself does not find the keys: it is certain of them by "
                f"{float(found.dense.mean()):.2f}, where guessing gives {1 / len(prompts[0].choices):g}"
            )
        chosen = [prompts[index] for index in kept]
        return retrieval.Retrieval("retrieval", chosen, found.dense[kept], self.seed, self.tokens_at_once)

    def reasoning(self) -> Capability | str:
        """Word problems that the dense model solves step by step."""
        asked = reasoning.reasoning_prompts(self.sizes.problems, self.seed)
        # Worked examples stand in front, which a chat template would only hide.
        ids = [prompt_ids(self.tokenizer, one.prompt, chat=False) for one in asked]
        if max(map(len, ids)) + reasoning.SOLUTION > self.longest:
            return (
                f"problems and their solutions do not fit into the {self.longest} tokens that the model reads"
            )
        answers = [one.answer or "" for one in asked]

        def solved(some: slice) -> Matches:
            return Matches.recorded(
                "reasoning",
                self.model,
                self.tokenizer,
                ids[some],
                answers[some],
                reasoning.SOLUTION,
                self.seed,
                reasoning.solves,
            )

        found = solved(slice(reasoning.FIRST))
        if float(found.dense.sum()) and len(ids) > reasoning.FIRST:
            # Each is asked once.
            others = solved(slice(reasoning.FIRST, None))
            found = replace(found, prompts=ids, answers=answers, dense=torch.cat([found.dense, others.dense]))
        share = float(found.dense.mean())
        if share < reasoning.LEAST:
            return (
                f"the dense model itself solves {share:.0%} of the problems, and reasoning is judged from "
                f"{reasoning.LEAST:.0%} on"
            )
        return found

    def yours(self, prompts: Sequence[Prompt], judging: Judging) -> Capability | str | None:
        """The user's prompts; None if there are none."""
        if not prompts:
            return None
        if prompts[0].answer is None:
            rows = self._written([("", one.prompt) for one in prompts], _ANSWER, "yours")
            return rows if isinstance(rows, str) else self._predictions("yours", rows)
        ids = [prompt_ids(self.tokenizer, one.prompt, self.chat) for one in prompts]
        answers = [one.answer or "" for one in prompts]
        if judging == "match":
            return self._matches(ids, answers)
        rows = [
            Row(asked, self._answer(one.prompt, asked, answer))
            for one, asked, answer in zip(prompts, ids, answers, strict=True)
        ]
        rows = [row for row in rows if row.scored and len(row.context) + len(row.scored) <= self.longest]
        if len(rows) < 2:
            return f"fewer than two of the prompts fit into the {self.longest} tokens that the model reads"
        chance = 1 / self.model.get_input_embeddings().num_embeddings
        found = Likelihoods.recorded("yours", self.model, rows, chance, self.seed, self.tokens_at_once)
        if found.probability("") < 2 * chance:
            return "the dense model itself finds the answers no likelier than any others"
        return found

    def _matches(self, ids: list[list[int]], answers: list[str]) -> Capability | str:
        # What stands behind the answer's last line is not compared, and an answer may take other tokens than ours.
        tokens = min(max(len(self._ids(answer)) for answer in answers) + 8, self.longest)
        fits = [index for index, asked in enumerate(ids) if len(asked) + tokens <= self.longest]
        if len(fits) < 2:
            return f"fewer than two of the prompts fit into the {self.longest} tokens that the model reads"
        found = Matches.recorded(
            "yours",
            self.model,
            self.tokenizer,
            [ids[index] for index in fits],
            [answers[index] for index in fits],
            tokens,
            self.seed,
        )
        if not float(found.dense.sum()):
            return "the dense model itself writes none of the answers"
        return found

    def _answer(self, prompt: str, ids: list[int], answer: str) -> list[int]:
        """Tokens of an answer behind its prompt."""
        if self._chats:
            return self._ids(answer)
        # Cut where the prompt alone would end, since tokens may reach over the seam.
        between = "" if prompt[-1:].isspace() or answer[:1].isspace() else " "
        whole = self.tokenizer(prompt + between + answer, truncation=False, verbose=False)["input_ids"]
        return [int(token) for token in whole[len(ids) :]]

    def _ids(self, text: str) -> list[int]:
        ids = self.tokenizer(text, add_special_tokens=False, truncation=False, verbose=False)["input_ids"]
        return [int(token) for token in ids]

    @property
    def _chats(self) -> bool:
        return self.chat is not False and getattr(self.tokenizer, "chat_template", None) is not None

    def _predictions(self, name: str, rows: list[Row]) -> Capability:
        return Predictions.recorded(name, self.model, rows, self.seed, self.tokens_at_once)

    def _written(self, prompts: list[tuple[str, str]], new_tokens: int, name: str) -> list[Row] | str:
        found = own_words(
            self.model,
            self.tokenizer,
            prompts,
            new_tokens=min(new_tokens, self.longest // 2),
            longest=self.longest,
            chat=self.chat,
            cache=self.cache,
        )
        if len(found.rows) < 2:
            return f"fewer than two of the prompts fit into the {self.longest} tokens that the model reads"
        self.record[name] = {"digest": found.digest, "prompts": len(found.rows)}
        return list(found.rows)
