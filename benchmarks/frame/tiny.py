"""Models and data sets so small that a smoke run reads them in place of real ones, in the same layout."""

from __future__ import annotations

import gzip
import json
import string
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    BertConfig,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from benchmarks.frame.registry import Model
from slimformer.text.sources import load_texts

_SIZES = {"vocab_size": 128, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}


def write_models(folder: Path) -> None:
    """Two decoders and an encoder with random weights, each with a tokenizer in a folder of its kind."""
    # Room for so few positions that contexts beyond them are short.
    llama = LlamaConfig(**_SIZES, num_hidden_layers=5, num_key_value_heads=2, max_position_embeddings=512)
    bert = BertConfig(**_SIZES, num_hidden_layers=3)
    made: dict[Model, PreTrainedModel] = {
        "decoder": LlamaForCausalLM(llama),
        "instruction-tuned decoder": LlamaForCausalLM(llama),
        "embedding model": BertModel(bert),
    }
    for name, model in made.items():
        model.save_pretrained(folder / name)
        character_tokenizer().save_pretrained(folder / name)


def write_data(folder: Path) -> None:
    """Every file that a benchmark reads."""
    texts = load_texts(None, limit=20)[0]
    lines = [f"{'a line of text ' * (1 + number % 7)}{number}" for number in range(40)]
    wiki, prose = "\n".join(lines), "\n".join(texts)[:30_000]
    files = {
        "c4_calib/c4_demo.jsonl": _rows({"text": text} for text in texts),
        "c4_calib/wiki_demo.txt": wiki,
        "wikitext2/wiki.test.raw": wiki,
        "wikitext2/wiki.train.raw.slice5k.txt": wiki,
        "lambada_openai/lambada_openai.jsonl": _rows([{"context": lines[0], "continuation": "text"}]),
        "piqa/valid.jsonl": _rows([{"goal": lines[1], "sol1": "a text", "sol2": "no text"}]),
        "piqa/valid-labels.lst": "1\n",
        "arc_easy/arc_easy.jsonl": _rows([{"query": lines[2], "choices": ["a", "line", "text"], "gold": 2}]),
        "openbookqa/openbook_qa.jsonl": _rows([{"query": lines[2], "choices": ["a", "line"], "gold": 1}]),
        "gsm8k/gsm8k.jsonl": _rows(
            {"context": line[-20:], "chain_of_thought": "a text", "answer": str(number)}
            for number, line in enumerate(lines[:12])
        ),
        "instructions/alpaca_en_demo.json": json.dumps(
            [{"instruction": lines[3], "input": "", "output": lines[4]}]
        ),
        "instructions/dolly_hhrlhf_train_small.jsonl": _rows([{"prompt": lines[5], "response": lines[6]}]),
    }
    for name in ("Moby-Dick--Or-The-Whale", "Great-Expectations", "Frankenstein"):
        # What producers say takes up the first part of a book.
        files[f"books/{name}.txt"] = " " * 20_000 + prose
    for split in ("train", "test"):
        rows = [f"{i / 10}\t{lines[i]}\t{lines[-i]}" for i in range(1, 9)]
        files[f"stsb/{split}.tsv"] = "\n".join(["score\tsentence1\tsentence2", *rows])
    for collection, corpus in (("cranfield", lines), ("qmsum_retrieval", [prose[i::40] for i in range(40)])):
        documents = [{"_id": f"d{number}", "text": text} for number, text in enumerate(corpus)]
        queries = [
            {"_id": f"q{number}", "text": text, "question": f"which text is {number}?"}
            for number, text in enumerate(lines[:8])
        ]
        files[f"{collection}/corpus.jsonl"] = _rows(documents)
        files[f"{collection}/queries.jsonl"] = _rows(queries)
        answers = [f"q{number}\td{number}\t1" for number in range(8)]
        files[f"{collection}/qrels/test.tsv"] = "\n".join(["query-id\tcorpus-id\tscore", *answers])
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")
    meetings = folder / "qmsum_retrieval" / "corpus.jsonl"
    with gzip.open(meetings.with_suffix(".jsonl.gz"), "wb") as packed:
        packed.write(meetings.read_bytes())
    meetings.unlink()


def _rows(objects: Any) -> str:
    rows: Sequence[Mapping[str, Any]] = list(objects)
    return "\n".join(map(json.dumps, rows)) + "\n"


def character_tokenizer() -> PreTrainedTokenizerBase:
    """One token per printable character."""
    words = ["<unk>", *string.printable]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("[\\s\\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", pad_token="<unk>", model_max_length=512
    )
