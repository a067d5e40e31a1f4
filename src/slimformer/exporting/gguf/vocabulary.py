"""The tokenizer of a checkpoint in llama.cpp's terms, for the kinds of tokenizers that both cut alike."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slimformer.errors import ExportError
from slimformer.exporting.source import read_object

FILE = "tokenizer.json"
# What texts are split by in front of the merges, and what llama.cpp calls it.
_GPT2_SPLIT = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
_BYTES = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}
_DIGITS = {"type": "Digits", "individual_digits": True}
_WORDS, _REST = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|",
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
)
_QWEN2, _LLAMA3 = rf"{_WORDS}\p{{N}}{_REST}", rf"{_WORDS}\p{{N}}{{1,3}}{_REST}"
# Numbers of types of tokens.
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = 1, 2, 3, 4, 5, 6


@dataclass(frozen=True)
class Vocabulary:
    """A tokenizer.

    Attributes:
        model: `"gpt2"` for merges of bytes, `"llama"` for pieces with scores.
        pre: How texts are split in front of the merges.
        tokens: By number, as many as the model has rows for.
        types: What each is.
        scores: Of each, where the model is `"llama"`.
        space_in_front: Whether texts are read with a space in front, there.
    """

    model: str
    pre: str
    tokens: list[str]
    types: list[int]
    scores: list[float] | None = None
    space_in_front: bool = False

    def add_to(self, gguf: Any, writer: Any, folder: Path) -> None:
        """Write it, with merges, special tokens and the chat template, which are read in `folder`."""
        writer.add_tokenizer_model(self.model)
        writer.add_tokenizer_pre(self.pre)
        writer.add_token_list(self.tokens)
        writer.add_token_types(self.types)
        if self.scores is not None:
            writer.add_token_scores(self.scores)
            writer.add_add_space_prefix(self.space_in_front)
        special = gguf.SpecialVocab(folder, load_merges=self.scores is None, n_vocab=len(self.tokens))
        for name in ("bos", "eos"):
            # Left out, what llama.cpp puts in front depends on the kind of tokenizer.
            special.add_special_token.setdefault(name, False)
        special.add_to_gguf(writer, quiet=True)


def read_vocabulary(folder: Path, rows: int) -> Vocabulary:
    """The tokenizer of a checkpoint.

    Args:
        folder: The checkpoint's.
        rows: How many tokens the model has embeddings for.

    Raises:
        ExportError: If there is none, or none that llama.cpp is known to cut alike.
    """
    if not (folder / FILE).is_file():
        raise ExportError(
            f"There is no {FILE} in {folder}, and a GGUF file holds the tokenizer. Save it there: "
            "AutoTokenizer.from_pretrained(...).save_pretrained(folder)."
        )
    content = read_object(folder / FILE)
    model = content.get("model") or {}
    kind = model.get("type", "BPE" if "merges" in model else "unknown")
    if kind != "BPE":
        raise _unknown(folder, f"is of the kind {kind}, and GGUF is written for BPE")
    known: dict[str, int] = model["vocab"]
    tokens: list[str] = [f"[PAD{number}]" for number in range(rows)]
    types = [_UNUSED] * rows
    added = {token["content"]: token for token in content.get("added_tokens") or ()}
    numbers = {**known, **{name: token["id"] for name, token in added.items()}}
    beyond = [name for name, number in numbers.items() if number >= rows]
    if beyond:
        raise _unknown(folder, f"has tokens beyond the {rows} of the model, such as {beyond[0]!r}")
    for name, number in numbers.items():
        tokens[number] = name
        special = added[name]["special"] if name in added else False
        types[number] = _CONTROL if special else _USER_DEFINED if name in added else _NORMAL
    if model.get("byte_fallback"):
        return _pieces(folder, content, tokens, types)
    normalizer = (content.get("normalizer") or {}).get("type", "NFC")
    if normalizer != "NFC":
        raise _unknown(folder, f"normalises texts ({normalizer})")
    return Vocabulary("gpt2", _split(folder, content), tokens, types)


def _split(folder: Path, content: dict[str, Any]) -> str:
    """What llama.cpp calls the split in front of the merges."""
    steps = _steps(content.get("pre_tokenizer"), "pretokenizers")
    splits = [(step.get("pattern") or {}).get("Regex") for step in steps if step.get("type") == "Split"]
    whole = bool(content["model"].get("ignore_merges"))
    if _are(steps, _GPT2_SPLIT) and not whole:
        return "gpt-2"
    if _are(steps, _DIGITS, _GPT2_SPLIT) and not whole:
        return "smollm"
    if _are(steps, {"type": "Split", "behavior": "Isolated", "invert": False}, _BYTES):
        if splits == [_QWEN2] and not whole:
            return "qwen2"
        if splits == [_LLAMA3]:
            # The same split, with and without words that are taken whole where they are tokens.
            return "llama-bpe" if whole else "dbrx"
    shown = ", ".join(str(step.get("type")) for step in steps) or "none"
    raise _unknown(folder, f"splits texts in a way ({shown}) that was not compared with llama.cpp's")


def _are(steps: list[dict[str, Any]], *expected: dict[str, Any]) -> bool:
    return len(steps) == len(expected) and all(
        step.get(name) == value
        for step, fields in zip(steps, expected, strict=True)
        for name, value in fields.items()
    )


def _steps(part: dict[str, Any] | None, name: str) -> list[dict[str, Any]]:
    if part is None:
        return []
    return list(part[name]) if part.get("type") == "Sequence" else [part]


def _pieces(folder: Path, content: dict[str, Any], tokens: list[str], types: list[int]) -> Vocabulary:
    """A vocabulary of pieces: those that are merged first score highest.

    llama.cpp merges whatever gives a piece, so every pair that does has to be among the merges, and those of one piece
    behind each other.
    """
    model = content["model"]
    pairs = [tuple(pair.split(" ") if isinstance(pair, str) else pair) for pair in model["merges"]]
    order: dict[str, int] = {}
    for left, right in pairs:
        order.setdefault(left + right, len(order))
    groups = [order[left + right] for left, right in pairs]
    known, merged = model["vocab"], set(pairs)
    if groups != sorted(groups):
        raise _unknown(folder, "merges pairs in an order that scores of pieces cannot give")
    for piece in order:
        for cut in range(1, len(piece)):
            pair = (piece[:cut], piece[cut:])
            if pair[0] in known and pair[1] in known and pair not in merged:
                raise _unknown(folder, f"does not merge {pair[0]!r} and {pair[1]!r}, which llama.cpp would")
    for number, token in enumerate(tokens):
        if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
            types[number] = _BYTE
    if model.get("unk_token") in known:
        types[known[model["unk_token"]]] = _UNKNOWN
    scores = [-float(order.get(token, len(order))) for token in tokens]
    return Vocabulary("llama", "default", tokens, types, scores, _space_in_front(folder, content))


def _space_in_front(folder: Path, content: dict[str, Any]) -> bool:
    """Whether spaces become pieces' own, and one is put in front of a text."""
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    normalizer = _steps(content.get("normalizer"), "normalizers")
    split = _steps(content.get("pre_tokenizer"), "pretokenizers")
    if _are(normalizer, {"type": "Prepend", "prepend": "▁"}, replace) and not split:
        return True
    # Splitting by a space that the step before has replaced does nothing.
    nothing = {"type": "Split", "pattern": {"String": " "}}
    if _are(normalizer, replace) and (not split or _are(split, nothing)):
        return False
    if not normalizer and _are(split, {"type": "Metaspace", "replacement": "▁", "split": False}):
        scheme = split[0].get("prepend_scheme")
        if scheme in ("first", "never"):
            return bool(scheme == "first")
    raise _unknown(folder, "treats spaces in a way that was not compared with llama.cpp's")


def _unknown(folder: Path, what: str) -> ExportError:
    return ExportError(
        f"The tokenizer in {folder} {what}. Export a checkpoint (to='checkpoint') where the plan drops whole blocks; "
        "llama.cpp's own converter may know the tokenizer."
    )
