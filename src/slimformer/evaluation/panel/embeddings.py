"""The panel for embeddings: neighbours on texts of several lengths, similarities of pairs, and the user's own task."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from slimformer.errors import CalibrationError, DataError
from slimformer.evaluation.embedding_tasks import EmbeddingTask, NeighbourTask, PairTask, nearest
from slimformer.evaluation.panel.builtin import builtin_texts
from slimformer.evaluation.panel.capability import Capability, Kept, bootstrapped
from slimformer.evaluation.panel.panel import Panel, record_of
from slimformer.evaluation.panel.sizes import SIZES, PanelBudget
from slimformer.evaluation.readable import longest
from slimformer.evaluation.retrieval import RetrievalTask
from slimformer.evaluation.similarity_task import mean_pooled_embedder
from slimformer.model.anatomy import find_anatomy
from slimformer.patching import status

Embed = Callable[[Any, Sequence[str]], Tensor]
_MOST_NEIGHBOURS, _ONE_IN = 10, 5
_FEWEST_TEXTS = 6
_SENTENCES = re.compile(r"(?<=[.!?。！？])\s+|\n+")
_RANKS = 10
_MOST_TOKENS = 512


def embedding_panel(
    model: Any,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    texts: Sequence[str] | None = None,
    text_source: str = "given",
    task: EmbeddingTask | None = None,
    budget: PanelBudget = "standard",
    batch_size: int = 32,
    seed: int = 0,
) -> Panel:
    """Record what embeddings of the dense model are like.

    Args:
        model: A SentenceTransformer, or a transformers model, whose last hidden states are averaged; unpatched.
        tokenizer: Of a transformers model.
        texts: The user's texts, which are sorted into short, middling and long ones; left out, sentences, paragraphs
            and whole texts of several topics and languages that come with the package.
        text_source: Where they came from, for the record.
        task: The user's own task, as `read_task` reads it, for the capability `yours`; needs a SentenceTransformer.
        budget: How many texts of each length.
        batch_size: Texts per forward.
        seed: Which texts and pairs.

    Raises:
        CalibrationError: If the model is patched, or its embeddings hold NaN.
        DataError: If there are too few texts, or there is no tokenizer.

    Example:
        >>> panel = embedding_panel(model)  # doctest: +SKIP
        >>> panel.measured(model, slimformer.LayerDrop(block=[4])).worst.name  # doctest: +SKIP
        'neighbours'
    """
    if budget not in SIZES:
        raise DataError(f"budget must be one of {', '.join(SIZES)}, got {budget!r}.")
    if status(model):
        raise CalibrationError(
            "The model is patched; a panel is recorded with the dense model. Call unpatch first."
        )
    embed = _embedder(model, tokenizer, batch_size)
    by_length = _builtin() if texts is None else _thirds(texts)
    chosen = {name: _some(of, SIZES[budget].texts, seed) for name, of in by_length.items()}
    chosen = {name: of for name, of in chosen.items() if len(of) >= _FEWEST_TEXTS}
    if not chosen:
        raise DataError(
            f"Neighbours are looked for among at least {_FEWEST_TEXTS} texts of each length, and there are "
            f"{sum(map(len, by_length.values()))} texts. Give more."
        )
    capabilities: list[Capability] = [
        Neighbours.recorded("neighbours", model, chosen, embed, seed),
        Pairs.recorded("similarities", model, chosen, embed, seed),
    ]
    left_out = {}
    if task is not None:
        yours = _yours(model, task, embed, seed)
        if isinstance(yours, str):
            left_out["yours"] = yours
        else:
            capabilities.append(yours)
    source = "built in" if texts is None else text_source
    more = {} if task is None else {"prompts": task.source}
    return Panel(
        capabilities, left_out, record_of(capabilities, budget=budget, seed=seed, data=source, **more)
    )


@dataclass(frozen=True)
class Neighbours:
    """Texts with the nearest neighbours that the dense model finds among those of their length.

    Kept is the share of these that another model finds too, above what chance finds.

    Attributes:
        name: The capability.
        texts: By length.
        embed: From model and texts to embeddings `[texts, hidden]`.
        dense: Of each length, the neighbours `[texts, neighbours]`.
        seed: Of the bootstrap.
    """

    name: str
    texts: Mapping[str, Sequence[str]]
    embed: Embed
    dense: Mapping[str, Tensor]
    seed: int

    @classmethod
    def recorded(
        cls, name: str, model: Any, texts: Mapping[str, Sequence[str]], embed: Embed, seed: int
    ) -> Neighbours:
        """Look for the dense model's neighbours."""
        found = {length: nearest(embed(model, of), _neighbours(len(of))) for length, of in texts.items()}
        return cls(name, texts, embed, found, seed)

    def judged(self, model: Any) -> Kept:
        """The part that a model keeps, with the mean share of neighbours."""
        shares, above, groups = [], [], []
        for length, of in self.texts.items():
            dense = self.dense[length]
            found = nearest(self.embed(model, of), dense.shape[1])
            share = (found[:, :, None] == dense[:, None, :]).any(-1).double().mean(1)
            chance = dense.shape[1] / (len(of) - 1)
            shares.append(share)
            above.append((share - chance) / (1 - chance))
            groups += [length] * len(of)
        kept = torch.cat(above)
        figures = {"neighbours": float(torch.cat(shares).mean())}
        return bootstrapped(
            self.name,
            groups,
            lambda times: 1 - (times @ (1 - kept)) / times.sum(1),
            figures,
            pooled=False,
            seed=self.seed,
        )

    def digest_parts(self) -> Sequence[Any]:
        """The texts."""
        return [self.name, *self.texts.items()]


@dataclass(frozen=True)
class Pairs:
    """Pairs of texts with the dense model's cosines, or with gold scores.

    Kept is the rank correlation of a model's cosines with the dense model's; with gold scores, the correlation with
    these over the dense model's correlation with them.

    Attributes:
        name: The capability.
        pairs: Pairs of texts.
        embed: From model and texts to embeddings `[texts, hidden]`.
        dense: The dense model's cosine of each pair.
        gold: Gold scores, if there are any.
        seed: Of the bootstrap.
    """

    name: str
    pairs: Sequence[tuple[str, str]]
    embed: Embed
    dense: Tensor
    seed: int
    gold: Tensor | None = None

    @classmethod
    def recorded(
        cls, name: str, model: Any, texts: Mapping[str, Sequence[str]], embed: Embed, seed: int
    ) -> Pairs:
        """Draw pairs of texts that stand beside each other, and of others, of the same length; take their cosines.

        Of several lengths the longest is left out: it takes most of the time, and its neighbours are judged anyway.
        """
        generator = torch.Generator().manual_seed(seed)
        pairs = []
        for of in list(texts.values())[: max(len(texts) - 1, 1)]:
            for index, text in enumerate(of):
                other = int(torch.randint(len(of) - 1, (), generator=generator))
                # Never itself; and the one behind it, which is often of the same topic.
                pairs.append((text, of[other + (other >= index)]))
                pairs.append((text, of[(index + 1) % len(of)]))
        return cls(name, pairs, embed, _cosines(model, pairs, embed), seed)

    def judged(self, model: Any) -> Kept:
        """The part that a model keeps."""
        slim = _cosines(model, self.pairs, self.embed)
        gold = self.gold
        known = (
            None if gold is None else float(_correlation(torch.ones(1, len(gold)).double(), self.dense, gold))
        )

        def kept(times: Tensor) -> Tensor:
            if gold is None or known is None:
                return _correlation(times, self.dense, slim)
            lost = _correlation(times, self.dense, gold) - _correlation(times, slim, gold)
            return 1 - lost / known

        once = torch.ones(1, len(slim), dtype=torch.float64)
        figures = {"correlation": float(_correlation(once, self.dense, slim))}
        if gold is not None and known is not None:
            figures = {"task_dense": 100 * known, "task_slim": 100 * float(_correlation(once, slim, gold))}
        return bootstrapped(self.name, [""] * len(slim), kept, figures, pooled=True, seed=self.seed)

    def digest_parts(self) -> Sequence[Any]:
        """The pairs."""
        return [self.name, *self.pairs]


@dataclass(frozen=True)
class Search:
    """A collection in which each query is answered by known documents; kept is nDCG@10 over the dense model's.

    Attributes:
        name: The capability.
        task: Queries, documents and judgements.
        dense: The dense model's nDCG@10 of each query, float64 `[queries]`.
        seed: Of the bootstrap.
    """

    name: str
    task: RetrievalTask
    dense: Tensor
    seed: int

    def judged(self, model: Any) -> Kept:
        """The part that a model keeps, with nDCG@10 of both."""
        slim, known = ndcg(model, self.task), self.dense.mean()
        return bootstrapped(
            self.name,
            [""] * len(slim),
            lambda times: 1 - (times @ (self.dense - slim)) / times.sum(1) / known,
            {"task_dense": float(known), "task_slim": float(slim.mean())},
            pooled=True,
            seed=self.seed,
        )

    def digest_parts(self) -> Sequence[Any]:
        """The collection's name and its queries."""
        return [self.name, self.task.source, *self.task.queries.items()]


def ndcg(model: Any, task: RetrievalTask) -> Tensor:
    """nDCG@10 of every query, float64 `[queries]`, with documents either relevant or not.

    Raises:
        CalibrationError: If the model is no SentenceTransformer, or its embeddings hold NaN.
    """
    if not hasattr(model, "encode_document"):
        raise CalibrationError(
            f"Retrieval is measured with a SentenceTransformer, got {type(model).__name__}. SentenceTransformer("
            "folder) loads any transformers checkpoint, with mean pooling."
        )
    options = {"batch_size": task.batch_size, "convert_to_tensor": True, "show_progress_bar": False}
    documents = model.encode_document(task.texts, **options)
    scores = model.similarity(model.encode_query(list(task.queries.values()), **options), documents).cpu()
    if bool(scores.isnan().any()):
        raise CalibrationError("The embeddings hold NaN. Check the model and its dtype.")
    names = list(task.corpus)
    discount = torch.arange(2, 2 + min(_RANKS, len(names)), dtype=torch.float64).log2()
    found = []
    for query, ranked in zip(task.queries, scores.topk(len(discount)).indices.tolist(), strict=True):
        relevant = task.relevant[query]
        gains = torch.tensor([names[place] in relevant for place in ranked], dtype=torch.float64)
        found.append((gains / discount).sum() / (1 / discount[: len(relevant)]).sum())
    return torch.stack(found)


def _yours(model: Any, task: EmbeddingTask, embed: Embed, seed: int) -> Capability | str:
    if isinstance(task, RetrievalTask):
        search = Search("yours", task, ndcg(model, task), seed)
        return (
            search if float(search.dense.mean()) > 0 else "the dense model itself finds none of the documents"
        )
    if isinstance(task, PairTask):
        gold = torch.tensor(list(task.gold), dtype=torch.float64)
        pairs = Pairs("yours", list(task.pairs), embed, _cosines(model, task.pairs, embed), seed, gold)
        known = float(_correlation(torch.ones(1, len(gold)).double(), pairs.dense, gold))
        return pairs if known > 0 else "the dense model's own cosines do not agree with the gold scores"
    if isinstance(task, NeighbourTask):
        if len(task.texts) < _FEWEST_TEXTS:
            return (
                f"it has {len(task.texts)} texts, and neighbours are looked for among {_FEWEST_TEXTS} or more"
            )
        return replace(Neighbours.recorded("yours", model, {"": task.texts}, embed, seed), name="yours")
    raise DataError(f"A task of type {type(task).__name__} cannot be judged. read_task reads those that can.")


def _embedder(model: Any, tokenizer: PreTrainedTokenizerBase | None, batch_size: int) -> Embed:
    if hasattr(model, "encode"):

        def embed(given: Any, texts: Sequence[str]) -> Tensor:
            return _checked(
                given.encode(
                    list(texts), batch_size=batch_size, convert_to_tensor=True, show_progress_bar=False
                )
            )

        return embed
    if tokenizer is None:
        raise DataError(f"{type(model).__name__} needs its tokenizer to embed texts. Give it.")
    of = tokenizer

    def pooled(given: Any, texts: Sequence[str]) -> Tensor:
        return _checked(
            mean_pooled_embedder(given, of, batch_size=batch_size, max_length=_longest(given, of))(texts)
        )

    return pooled


def _checked(embeddings: Tensor) -> Tensor:
    if bool(embeddings.isnan().any()):
        raise CalibrationError("The embeddings hold NaN. Check the model and its dtype.")
    return embeddings.float().cpu()


def _longest(model: Any, tokenizer: PreTrainedTokenizerBase) -> int:
    return min(longest(find_anatomy(model), tokenizer), _MOST_TOKENS)


def _cosines(model: Any, pairs: Sequence[tuple[str, str]], embed: Embed) -> Tensor:
    texts = list(dict.fromkeys(text for pair in pairs for text in pair))
    place = {text: index for index, text in enumerate(texts)}
    embeddings = embed(model, texts).double()
    first, second = (embeddings[[place[pair[side]] for pair in pairs]] for side in (0, 1))
    return torch.nn.functional.cosine_similarity(first, second, dim=-1)


def _correlation(times: Tensor, first: Tensor, second: Tensor) -> Tensor:
    """Pearson's correlation of the ranks (Spearman's), each pair counted so many times `[resamples, pairs]`.

    Written over differences of standardised ranks, so that equal ranks give exactly 1.
    """
    scaled = []
    for values in (first, second):
        ranks = _ranks(values.double())
        mean = (times @ ranks) / times.sum(1)
        centred = ranks[None] - mean[:, None]
        deviation = ((times * centred**2).sum(1) / times.sum(1)).sqrt()
        scaled.append(centred / deviation.clamp_min(1e-12)[:, None])
    return 1 - 0.5 * (times * (scaled[0] - scaled[1]) ** 2).sum(1) / times.sum(1)


def _ranks(values: Tensor) -> Tensor:
    """Ranks from 0, the mean of them where values are equal."""
    _, inverse, counts = values.unique(sorted=True, return_inverse=True, return_counts=True)
    last = counts.cumsum(0).double()
    return (last - (counts + 1) / 2)[inverse]


def _neighbours(texts: int) -> int:
    return max(min(_MOST_NEIGHBOURS, texts // _ONE_IN), 1)


def _builtin() -> dict[str, list[str]]:
    """Sentences, paragraphs and whole texts of all kinds."""
    whole = [text for of in builtin_texts().values() for text in of]
    pieces = [part.strip() for text in whole for part in _SENTENCES.split(text)]
    parts = [part.strip() for text in whole for part in text.split("\n\n")]
    return {
        "sentences": list(dict.fromkeys(part for part in pieces if 15 < len(part) < 200)),
        "paragraphs": list(dict.fromkeys(part for part in parts if len(part) >= 60)),
        "whole texts": whole,
    }


def _thirds(texts: Sequence[str]) -> dict[str, list[str]]:
    unique = sorted(dict.fromkeys(text for text in texts if text.strip()), key=len)
    third = len(unique) // 3
    if third < _FEWEST_TEXTS:
        return {"all lengths": unique}
    return {"short": unique[:third], "middling": unique[third:-third], "long": unique[-third:]}


def _some(texts: Sequence[str], count: int, seed: int) -> list[str]:
    order = torch.randperm(len(texts), generator=torch.Generator().manual_seed(seed))[:count]
    return [texts[index] for index in sorted(order.tolist())]
