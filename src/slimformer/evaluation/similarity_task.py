"""How well embeddings tell similar sentences from others: the STS task (SemEval 2017, arXiv 1708.00055)."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from slimformer.errors import CalibrationError, DataError
from slimformer.evaluation.perplexity import evaluating
from slimformer.text.files import lines_of

_COLUMNS = ["score", "sentence1", "sentence2"]


def read_sts(path: str | Path) -> tuple[list[tuple[str, str]], list[float]]:
    """Read sentence pairs and their gold scores, as the STS benchmark is distributed.

    Args:
        path: A tab-separated UTF-8 file with the header `score`, `sentence1`, `sentence2`. Quotation marks are part
            of the sentences.

    Returns:
        The pairs, and one score per pair (in the benchmark 0, unrelated, to 5, the same meaning).

    Raises:
        DataError: If the file cannot be read, has another header, no row, or a row of another form.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "pairs.tsv"
        >>> _ = path.write_text("score\\tsentence1\\tsentence2\\n4.5\\tA dog runs.\\tA dog is running.\\n")
        >>> read_sts(path)
        ([('A dog runs.', 'A dog is running.')], [4.5])
    """
    lines = "".join(lines_of(Path(path))).rstrip("\n").split("\n")
    expected = f"Expected the columns {', '.join(_COLUMNS)}, separated by tabs."
    if lines[0].split("\t") != _COLUMNS:
        raise DataError(f"{path} begins with {lines[0][:80]!r}. {expected}")
    pairs, scores = [], []
    for number, line in enumerate(lines[1:], start=2):
        try:
            score, first, second = line.split("\t")
            scores.append(float(score))
        except ValueError as error:
            raise DataError(f"Line {number} of {path} is {line[:80]!r}. {expected}") from error
        pairs.append((first, second))
    if not pairs:
        raise DataError(f"{path} holds a header and no pairs. {expected}")
    return pairs, scores


def spearman_sts(
    embed: Callable[[list[str]], Any], pairs: Sequence[tuple[str, str]], scores: Sequence[float]
) -> float:
    """Spearman correlation of cosine similarities with gold scores, times 100.

    Args:
        embed: Gives the embeddings `[texts, hidden]` of a list of texts as a tensor or array:
            `SentenceTransformer.encode`, or what `mean_pooled_embedder` returns.
        pairs: Pairs of sentences.
        scores: The gold score of every pair.

    Returns:
        Between -100 and 100.

    Raises:
        DataError: If there are fewer than two pairs, not one score per pair, or only one value among the scores; or
            if scipy (the extra `embeddings`) is not installed.
        CalibrationError: If the embeddings have the wrong shape, hold NaN, or are all equally similar.

    Example:
        >>> pairs, scores = [("a", "a"), ("a", "b"), ("b", "a b")], [5.0, 0.0, 2.5]
        >>> spearman_sts(lambda texts: [[float(c in t) for c in "ab"] for t in texts], pairs, scores)
        100.0
    """
    if len(pairs) != len(scores) or len(pairs) < 2 or len(set(scores)) < 2:
        raise DataError(
            f"Expected at least two pairs, one score for each, and two different scores; got {len(pairs)} pairs and "
            f"{len(scores)} scores with {len(set(scores))} different values."
        )
    try:
        stats = importlib.import_module("scipy.stats")
    except ImportError as error:
        raise DataError(
            'The Spearman correlation needs scipy, which is not installed: pip install "slimformer[embeddings]"'
        ) from error
    texts = [text for column in zip(*pairs, strict=True) for text in column]
    embeddings = torch.as_tensor(embed(texts)).float().cpu()
    if embeddings.ndim != 2 or len(embeddings) != len(texts) or embeddings.isnan().any():
        raise CalibrationError(
            f"Expected embeddings [texts, hidden] without NaN for {len(texts)} texts, got {tuple(embeddings.shape)}"
            f"{' with NaN' if embeddings.isnan().any() else ''}. Check the model and its dtype."
        )
    first, second = embeddings.double().chunk(2)
    cosines = F.cosine_similarity(first, second, dim=-1)
    if cosines.min() == cosines.max():
        raise CalibrationError(
            "All pairs are equally similar, so nothing can be ranked. The model gives every text the same embedding; "
            "drop fewer sublayers."
        )
    return 100 * float(stats.spearmanr(cosines.numpy(), list(scores)).statistic)


def mean_pooled_embedder(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    batch_size: int = 32,
    max_length: int = 512,
) -> Callable[[Sequence[str]], Tensor]:
    """Embeddings without sentence-transformers: the mean of the last hidden states, scaled to length 1.

    Args:
        model: An encoder without a head, such as `AutoModel` loads. It is run as it is at every call, patched or not.
        tokenizer: The model's tokenizer; it must have a padding token.
        batch_size: Texts per forward.
        max_length: Most tokens per text; what is behind is not read.

    Returns:
        A function from texts to float32 embeddings `[texts, hidden]` on the CPU.

    Raises:
        DataError: If a size is below 1 or the tokenizer has no padding token; by the function, if there is no text.

    Example:
        >>> from transformers import BertConfig, BertModel, BertTokenizer
        >>> words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "one", "two"]
        >>> tokenizer = BertTokenizer(vocab={word: index for index, word in enumerate(words)})
        >>> config = BertConfig(vocab_size=7, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
        ...                     num_attention_heads=2)
        >>> mean_pooled_embedder(BertModel(config), tokenizer)(["one", "two", "one two"]).shape
        torch.Size([3, 8])
    """
    if batch_size < 1 or max_length < 1:
        raise DataError(f"batch_size and max_length must be at least 1, got {batch_size} and {max_length}.")
    if tokenizer.pad_token_id is None:
        raise DataError(
            "The tokenizer has no padding token, and texts of different lengths need one. "
            "Set tokenizer.pad_token, for instance to tokenizer.eos_token."
        )

    def embed(texts: Sequence[str]) -> Tensor:
        if not texts or isinstance(texts, str):
            raise DataError(f"Expected a list of texts with at least one, got {texts!r}.")
        parts = []
        with evaluating(model):
            for start in range(0, len(texts), batch_size):
                batch = tokenizer(
                    list(texts[start : start + batch_size]),
                    truncation=True,
                    max_length=max_length,
                    padding=True,
                    return_tensors="pt",
                ).to(model.device)
                mask = batch["attention_mask"]
                hidden = model(input_ids=batch["input_ids"], attention_mask=mask).last_hidden_state
                parts.append(F.normalize(masked_mean(hidden, mask), dim=-1).cpu())
        return torch.cat(parts)

    return embed


def masked_mean(hidden: Tensor, mask: Tensor) -> Tensor:
    """Mean over the tokens that are not padding.

    Args:
        hidden: Hidden states `[batch, tokens, hidden]`.
        mask: 1 at tokens, 0 at padding `[batch, tokens]`.

    Returns:
        `[batch, hidden]`, float32; zeros for a row without tokens.

    Example:
        >>> masked_mean(torch.tensor([[[1.0], [3.0], [9.0]]]), torch.tensor([[1, 1, 0]]))
        tensor([[2.]])
    """
    weights = mask.to(hidden.device).float().unsqueeze(-1)
    # Padding may hold anything, NaN too, which a weight of 0 would not silence.
    kept = hidden.float().masked_fill(weights == 0, 0.0)
    return kept.sum(1) / weights.sum(1).clamp_min(1)
