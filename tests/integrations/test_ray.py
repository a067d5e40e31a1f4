"""Corpora on Ray Data: the vectors of `encode`, and the same files whatever was killed on the way."""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet as parquet
import pytest
from sentence_transformers import SentenceTransformer
from sentence_transformers.util import quantize_embeddings

import slimformer
from command_line import refused, run
from embedding_data import TEXTS, pipeline
from slimformer import LayerDrop, Plan
from slimformer.corpora.shards import vectors_of

ray: Any = pytest.importorskip("ray", reason="Ray is not installed: make test-ray")
pytest.importorskip("ray.data")
psutil: Any = pytest.importorskip("psutil")

import slimformer.integrations.ray.cluster as cluster  # noqa: E402
from slimformer.integrations.ray import embed_dataset  # noqa: E402

ENVIRONMENT = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
BAD = {7: None, 19: " ", 40: ""}


@pytest.fixture(scope="module")
def running() -> Iterator[None]:
    """One Ray for several runs in this process: starting it takes longer than any of them."""
    with cluster.running_ray(None, 2):
        yield


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    pipeline(folder / "b").save(str(folder / "bert"))
    decoder = pipeline(folder / "l", "lasttoken", "llama")
    decoder.prompts = {"query": "a cat "}
    decoder.save(str(folder / "llama"))
    Plan([LayerDrop(attention=[1])]).save_pretrained(folder / "plan")
    return folder


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    texts = [BAD.get(number, text) for number, text in enumerate(TEXTS)]
    path = tmp_path_factory.mktemp("corpus") / "corpus.parquet"
    table = pyarrow.table({"id": [f"d{n}" for n in range(60)], "text": texts})
    parquet.write_table(table, path, row_group_size=25)
    path.with_suffix(".jsonl").write_text("".join(json.dumps(row) + "\n" for row in table.to_pylist()))
    return path


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("part-*"))}


def expected(model: Path, **options: Any) -> Any:
    good = [text for number, text in enumerate(TEXTS) if number not in BAD]
    return SentenceTransformer(str(model), device="cpu").encode(good, **options)


@pytest.mark.parametrize("kind", [".parquet", ".jsonl"])
def test_a_corpus_gets_the_vectors_of_encode_with_rows_and_ids(
    kind: str, running: None, models: Path, corpus: Path, tmp_path: Path
) -> None:
    command = ["embed", models / "bert", "--input", corpus.with_suffix(kind), "-o", tmp_path / "out",
               "--id-column", "id", "--shard-rows", 16, "--matrix", "--device", "cpu"]  # fmt: skip
    said = run(*command).stderr
    assert "holds the vectors of 57 texts in 4 files, 3 left out (bad_rows)." in said
    good = [number for number in range(60) if number not in BAD]
    table = parquet.read_table(tmp_path / "out" / "vectors")
    assert table.column("row").to_pylist() == good
    assert table.column("id").to_pylist() == [f"d{number}" for number in good]
    assert np.abs(vectors_of(table) - expected(models / "bert")).max() < 1e-5
    assert np.array_equal(np.load(tmp_path / "out" / "vectors.npy"), vectors_of(table))
    lines = [line for path in sorted((tmp_path / "out" / "bad_rows").iterdir()) for line in path.open()]
    assert [(row["row"], row["id"], row["reason"]) for row in map(json.loads, lines)] == [
        (7, "d7", "null"), (19, "d19", "empty"), (40, "d40", "empty"),
    ]  # fmt: skip
    # What is missing is made again, and nothing else.
    whole = files(tmp_path / "out")
    written = {path: path.stat().st_mtime_ns for path in (tmp_path / "out" / "vectors").iterdir()}
    gone = tmp_path / "out" / "vectors" / "part-000001.parquet"
    gone.unlink()
    run(*command)
    assert files(tmp_path / "out") == whole
    assert [path for path, when in written.items() if path.stat().st_mtime_ns != when] == [gone]
    # A finished run starts nothing, and other settings are another run.
    assert "57 texts in 4 files" in run(*command, "--batch-tokens", 64).stderr
    assert 'another run: precision was "float32" and is "int8"' in refused(*command, "--precision", "int8")
    other = [models / "llama" if word == models / "bert" else word for word in command]
    gone.unlink()
    assert "is not the one whose vectors are in" in refused(*other)


def test_decoders_plans_and_prompts(running: None, models: Path, corpus: Path, tmp_path: Path) -> None:
    run("embed", models / "llama", "--plan", models / "plan", "--input", corpus, "-o", tmp_path / "out",
        "--prompt-name", "query", "--normalize", "--truncate-dim", 8, "--precision", "float16",
        "--device", "cpu")  # fmt: skip
    model = SentenceTransformer(str(models / "llama"), device="cpu")
    slimformer.patch(model, LayerDrop(attention=[1]))
    good = [text for number, text in enumerate(TEXTS) if number not in BAD]
    right = model.encode(good, prompt_name="query", normalize_embeddings=True, truncate_dim=8)
    found = vectors_of(parquet.read_table(tmp_path / "out" / "vectors"))
    assert found.dtype == np.float16
    assert np.abs(found - right).max() < 1e-3
    table = parquet.read_table(tmp_path / "out" / "vectors")
    assert table.column_names == ["row", "embedding"]


def test_all_shards_are_quantised_by_the_same_ranges(
    running: None, models: Path, corpus: Path, tmp_path: Path
) -> None:
    run("embed", models / "bert", "--input", corpus, "-o", tmp_path / "out", "--precision", "int8",
        "--shard-rows", 16, "--device", "cpu")  # fmt: skip
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    ranges = np.asarray(manifest["int8_ranges"], dtype=np.float32)
    right = expected(models / "bert")
    assert (ranges[0] <= right.max(axis=0)).all()
    found = vectors_of(parquet.read_table(tmp_path / "out" / "vectors"))
    clipped = np.clip(right, ranges[0], ranges[1])
    off = found.astype(int) - quantize_embeddings(clipped, "int8", ranges=ranges).astype(int)
    # A vector on the edge of a step may be rounded to either side of it by another batch.
    assert np.abs(off).max() <= 1
    assert (off == 0).mean() > 0.99


def test_what_is_wrong_is_said_in_one_line_and_nothing_is_lost(
    running: None, models: Path, corpus: Path, tmp_path: Path
) -> None:
    def command(model: Any, *more: Any) -> list[Any]:
        return ["embed", model, "--input", corpus, "-o", tmp_path / "out", "--device", "cpu", *more]

    assert "no column 'body'. Its columns: 'id', 'text'" in refused(
        *command(models / "bert", "--text-column", "body")
    )
    assert not (tmp_path / "out").exists()
    said = refused(*command(models / "absent"))
    assert "There is no folder" in said
    assert "(on " in said
    assert "no prompt 'passage'" in refused(
        *command(models / "llama", "--prompt-name", "passage"), "-o", tmp_path / "two"
    )
    assert "Ray knows 0" in refused(*command(models / "bert", "--device", "cuda"))
    said = refused(*command(models / "bert", "--max-bad", 2))
    assert "3 rows could not be embedded, and 2 may (--max-bad)" in said
    assert "57 texts in 1 files" in run(*command(models / "bert", "--max-bad", 3)).stderr


def test_a_dataset_gets_a_column_of_vectors_and_one_of_reasons(
    running: None, models: Path, corpus: Path
) -> None:
    dataset = ray.data.read_parquet(str(corpus)).add_column("more", lambda frame: frame["id"] + "!")
    found = embed_dataset(dataset, str(models / "bert"), models / "plan", workers=2, threads=1, rows=20)
    table = pyarrow.concat_tables(ray.get(found.to_arrow_refs())).sort_by("id")
    ids = sorted(range(60), key=lambda number: f"d{number}")
    assert table.column("more").to_pylist() == [f"d{number}!" for number in ids]
    assert table.column("embedding_error").to_pylist() == [
        {7: "null", 19: "empty", 40: "empty"}.get(number) for number in ids
    ]
    model = SentenceTransformer(str(models / "bert"), device="cpu")
    right = slimformer.patch(model, LayerDrop(attention=[1])).encode(TEXTS)
    for number, vector in zip(ids, table.column("embedding").to_pylist(), strict=True):
        if number in BAD:
            assert vector is None
        else:
            assert np.abs(np.asarray(vector) - right[number]).max() < 1e-5


def test_an_address_without_a_cluster_is_said_at_once(models: Path, corpus: Path, tmp_path: Path) -> None:
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{nobody.getsockname()[1]}"
        done = subprocess.run(
            [sys.executable, "-m", "slimformer", "embed", models / "bert", "--input", corpus, "-o", tmp_path / "out",
             "--ray", address],
            env=ENVIRONMENT, capture_output=True, text=True, check=False, timeout=120,
        )  # fmt: skip
    assert done.returncode == 1
    assert f"error: No Ray could be reached at {address}: [Errno 111] Connection refused." in done.stderr


class Started:
    """The command in a process of its own, on a corpus that takes it some seconds."""

    def __init__(self, models: Path, corpus: Path, output: Path) -> None:
        command = [sys.executable, "-m", "slimformer", "embed", models / "bert", "--input", corpus, "-o", output,
                   "--shard-rows", 100, "--workers", 2, "--threads", 1, "--device", "cpu"]  # fmt: skip
        self.output = output
        self.process = subprocess.Popen(
            list(map(str, command)), env=ENVIRONMENT, stderr=subprocess.PIPE, text=True
        )

    def workers(self) -> list[Any]:
        children = psutil.Process(self.process.pid).children(recursive=True)
        return [child for child in children if "ray::MapWorker" in " ".join(child.cmdline())]

    def wait_for(self, shards: int) -> None:
        while len(files(self.output)) < shards:
            assert self.process.poll() is None, self.process.communicate()[1]
            time.sleep(0.02)

    def ended(self, code: int) -> str:
        said = self.process.communicate()[1]
        assert self.process.returncode == code, said
        return str(said)


@pytest.fixture(scope="module")
def longer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    drawn = random.Random(0)
    texts = [" ".join(drawn.choices(" ".join(TEXTS).split(), k=drawn.randint(3, 30))) for _ in range(6000)]
    path = tmp_path_factory.mktemp("longer") / "corpus.parquet"
    parquet.write_table(pyarrow.table({"text": texts}), path, row_group_size=1500)
    return path


def test_a_run_whose_worker_and_driver_are_killed_ends_as_an_undisturbed_one(
    models: Path, longer: Path, tmp_path: Path
) -> None:
    Started(models, longer, tmp_path / "whole").ended(0)
    disturbed = Started(models, longer, tmp_path / "out")
    disturbed.wait_for(3)
    disturbed.workers()[0].kill()
    disturbed.wait_for(8)
    workers = disturbed.workers()
    disturbed.process.kill()
    psutil.wait_procs(workers, timeout=60)
    assert 8 <= len(files(tmp_path / "out")) < 60
    disturbed.process.communicate()
    again = Started(models, longer, tmp_path / "out")
    again.ended(0)
    whole = files(tmp_path / "whole")
    assert len(whole) == 60
    assert files(tmp_path / "out") == whole
    rows = parquet.read_table(tmp_path / "out" / "vectors").column("row").to_pylist()
    assert rows == list(range(6000))


def test_ctrl_c_ends_everything_and_the_same_command_goes_on(
    models: Path, longer: Path, tmp_path: Path
) -> None:
    first = Started(models, longer, tmp_path / "out")
    first.wait_for(2)
    workers = first.workers()
    first.process.send_signal(signal.SIGINT)
    assert "interrupted" in first.ended(130)
    assert psutil.wait_procs(workers, timeout=60)[1] == []
    before = files(tmp_path / "out")
    assert len(before) < 60
    said = Started(models, longer, tmp_path / "out").ended(0)
    assert "holds the vectors of 6,000 texts in 60 files" in said
    assert before.items() <= files(tmp_path / "out").items()
