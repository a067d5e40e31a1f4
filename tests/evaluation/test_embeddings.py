"""A patched embedding pipeline: the real all-MiniLM-L6-v2 gives the vectors it gave, by every way it is called."""

from __future__ import annotations

import copy
import pickle
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from sentence_transformers import CrossEncoder, SentenceTransformer
from sentence_transformers.models import Pooling, Transformer
from transformers import AutoModel, AutoModelForSequenceClassification, pipeline

import slimformer
from real_models import minilm
from slimformer import EarlyExit, LayerDrop, Plan
from slimformer.errors import PlanError, SlimformerWarning, UnsupportedModelError
from slimformer.methods.elimination.random_keep import RandomKeep
from slimformer.methods.weight_delta import WeightDelta
from slimformer.model.anatomy import transformer_of
from slimformer.plans.plan import FILE, WEIGHTS, fingerprint
from tiny_checkpoints import tiny_checkpoint, tiny_tokenizer
from tiny_models import dropped, tiny_model

DROP = LayerDrop(attention=[1], mlp=[2])
SENTENCE = "a cat sat on the mat and saw no dog run over hills of glass while seven old kings were asleep"
WORDS = SENTENCE.split()
TEXTS = [" ".join(WORDS[(i * 7 + j * j) % len(WORDS)] for j in range(1 + i * i % 37)) for i in range(24)]
ODD = ["", " ", "😀👩🏽‍🚀🇫🇷", "\n\t", "ünïcödé 漢字 ﷽", "x" * 400, "word " * 10_000]


@pytest.fixture(scope="module")
def real() -> SentenceTransformer:
    return SentenceTransformer(str(minilm()), device="cpu")


def tiny(folder: Path, name: str = "bert", mode: str = "mean") -> SentenceTransformer:
    transformer = Transformer(tiny_checkpoint(folder, name))
    return SentenceTransformer(modules=[transformer, Pooling(32, pooling_mode=mode)], device="cpu")


def worst_cosine(first: np.ndarray, second: np.ndarray) -> float:
    a, b = torch.as_tensor(first).double(), torch.as_tensor(second).double()
    return torch.nn.functional.cosine_similarity(a, b, dim=-1).min().item()


@pytest.mark.parametrize("batch_size", [1, 3, 32])
def test_lossless_gives_the_same_vectors_in_any_order(real: SentenceTransformer, batch_size: int) -> None:
    texts = [*TEXTS, *ODD]
    dense = real.encode(texts)
    order = random.Random(batch_size).sample(range(len(texts)), len(texts))
    with slimformer.patched(real):
        slim = real.encode([texts[i] for i in order], batch_size=batch_size)
    assert worst_cosine(slim, dense[order]) >= 0.99999
    assert np.abs(slim - dense[order]).max() < 1e-5


def test_one_text_and_thousands(real: SentenceTransformer) -> None:
    many = [f"{WORDS[i % 19]} {WORDS[i % 7]} {i}" for i in range(2000)]
    dense = real.encode(many, batch_size=128)
    with slimformer.patched(real):
        slim = real.encode(many, batch_size=128)
        one = real.encode(many[7])
    assert worst_cosine(slim, dense) >= 0.99999
    assert one.shape == (384,)
    assert worst_cosine(one[None], dense[7:8]) >= 0.99999


def test_a_batch_in_arrival_order_is_not_padded(real: SentenceTransformer) -> None:
    batch = real.tokenize([TEXTS[1], "word " * 200])
    with torch.no_grad():
        dense = real(dict(batch))["sentence_embedding"]
        with slimformer.patched(real):
            slim = real(dict(batch))["sentence_embedding"]
    assert worst_cosine(slim.numpy(), dense.numpy()) >= 0.99999


def test_unpatch_is_exact(real: SentenceTransformer) -> None:
    inner = transformer_of(real)
    attributes, keys, modules = (
        sorted(vars(inner)),
        list(real.state_dict()),
        [type(m) for m in real.modules()],
    )
    dense = real.encode(TEXTS)
    slimformer.patch(real, DROP)
    assert [type(m) for m in real.modules()] == modules
    assert list(real.state_dict()) == keys
    assert not np.array_equal(real.encode(TEXTS), dense)
    slimformer.unpatch(real)
    assert sorted(vars(inner)) == attributes
    assert np.array_equal(real.encode(TEXTS), dense)


@pytest.mark.parametrize("options", [
    {"truncate_dim": 64}, {"normalize_embeddings": True}, {"precision": "int8"}, {"precision": "ubinary"},
    {"prompt": "query: "}, {"convert_to_tensor": True}, {"output_value": "token_embeddings"},
], ids=lambda options: next(iter(options)))  # fmt: skip
def test_encode_keeps_its_interface(real: SentenceTransformer, options: dict[str, object]) -> None:
    dense = real.encode(TEXTS, **options)
    with slimformer.patched(real):
        slim = real.encode(TEXTS, **options)
    assert type(slim) is type(dense)
    for found, wanted in zip(slim, dense, strict=True):
        found, wanted = np.asarray(found), np.asarray(wanted)
        assert found.dtype == wanted.dtype
        assert found.shape == wanted.shape
        # Rounding may move a quantised value by one step.
        loose = 1 if options.get("precision") == "int8" else 1e-5
        if options.get("precision") == "ubinary":
            assert np.unpackbits(found ^ wanted).mean() <= 0.01
        else:
            assert np.abs(found.astype(float) - wanted.astype(float)).max() <= loose


def test_similarity_queries_and_documents(real: SentenceTransformer) -> None:
    prompted = SentenceTransformer(
        modules=list(real), prompts={"query": "find: ", "document": "text: "}, device="cpu"
    )

    def table() -> torch.Tensor:
        return prompted.similarity(prompted.encode_query(TEXTS[:5]), prompted.encode_document(TEXTS))

    dense, plain = table(), real.similarity(real.encode(TEXTS[:5]), real.encode(TEXTS))
    with slimformer.patched(prompted):
        torch.testing.assert_close(table(), dense, atol=1e-5, rtol=0)
    assert (dense - plain).abs().max() > 1e-2


def test_several_processes_encode_with_the_patch(tmp_path: Path) -> None:
    model = slimformer.patch(tiny(tmp_path), DROP)
    expected = model.encode(TEXTS)
    pool = model.start_multi_process_pool(["cpu", "cpu"])
    try:
        found = model.encode(TEXTS, pool=pool, chunk_size=8)
    finally:
        model.stop_multi_process_pool(pool)
    assert np.abs(found - expected).max() < 1e-5
    assert np.abs(slimformer.unpatch(model).encode(TEXTS) - expected).max() > 1e-4


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_of_a_patched_pipeline_saves_its_own_weights(tmp_path: Path, copied: object) -> None:
    model = slimformer.patch(tiny(tmp_path / "from"), DROP)
    other = copied(model)
    with torch.no_grad():
        weight = transformer_of(other).get_input_embeddings().weight
        weight.copy_(weight.flip(0))
    other.save_pretrained(str(tmp_path / "to"))
    again = SentenceTransformer(str(tmp_path / "to"), device="cpu")
    slimformer.patch(again, "auto")
    assert dropped(again) == {1: ["attention"], 2: ["mlp"]}
    assert np.abs(again.encode(TEXTS) - other.encode(TEXTS)).max() < 1e-6
    assert np.abs(again.encode(TEXTS) - model.encode(TEXTS)).max() > 1e-3


def test_a_saved_pipeline_brings_its_plan(tmp_path: Path, real: SentenceTransformer) -> None:
    mean = LayerDrop(mlp=[3], replace="mean", weights={"mlp.3.bias": torch.full((384,), 0.1)})
    plan = Plan([DROP, mean], fingerprint(transformer_of(real)), {"data": "notes"})
    with slimformer.patched(real, plan):
        expected = real.encode(TEXTS)
        real.save_pretrained(str(tmp_path / "slim"))
    real.save_pretrained(str(tmp_path / "dense"))
    assert {FILE, WEIGHTS} <= {path.name for path in (tmp_path / "slim").iterdir()}
    assert {path.name for path in (tmp_path / "slim").iterdir()} - {FILE, WEIGHTS} == {
        path.name for path in (tmp_path / "dense").iterdir()
    }
    again = SentenceTransformer(str(tmp_path / "slim"), device="cpu")
    assert np.abs(again.encode(TEXTS) - real.encode(TEXTS)).max() < 1e-6
    slimformer.patch(again, "auto")
    assert np.abs(again.encode(TEXTS) - expected).max() < 1e-6
    assert Plan.from_pretrained(tmp_path / "slim").provenance == {"data": "notes"}


def test_methods_given_one_by_one_are_saved_as_one_plan(tmp_path: Path) -> None:
    model = slimformer.patch(tiny(tmp_path / "from"), Plan([LayerDrop(mlp=[0])]), DROP)
    model.save_pretrained(str(tmp_path / "to"))
    assert Plan.from_pretrained(tmp_path / "to").methods == (LayerDrop(mlp=[0]), DROP)


def test_a_plan_in_the_folder_of_the_first_module_is_found(tmp_path: Path) -> None:
    model = tiny(tmp_path / "from")
    model.save(str(tmp_path / "to"))
    for file in [*(tmp_path / "to").glob("*.json"), *(tmp_path / "to").glob("*.safetensors")]:
        if file.name not in ("modules.json", "config_sentence_transformers.json"):
            (tmp_path / "to" / "0_Transformer").mkdir(exist_ok=True)
            file.rename(tmp_path / "to" / "0_Transformer" / file.name)
    modules = tmp_path / "to" / "modules.json"
    modules.write_text(modules.read_text().replace('"path": ""', '"path": "0_Transformer"'))
    Plan([DROP]).save_pretrained(tmp_path / "to" / "0_Transformer")
    again = slimformer.patch(SentenceTransformer(str(tmp_path / "to"), device="cpu"), "auto")
    assert dropped(again) == {1: ["attention"], 2: ["mlp"]}
    modules.write_text("[]")
    with pytest.raises(PlanError, match=r"modules\.json does not say where"):
        slimformer.patch(again, "auto")
    assert dropped(again) == {1: ["attention"], 2: ["mlp"]}
    assert dropped(slimformer.patch(again)) == {}


def hub_repository(cache: Path, repo_id: str, commit: str) -> Path:
    """A repository as the Hub's own cache holds it; returns the folder of the commit."""
    root = cache / f"models--{repo_id.replace('/', '--')}"
    (root / "refs").mkdir(parents=True)
    (root / "refs" / "main").write_text(commit)
    (root / "snapshots" / commit).mkdir(parents=True)
    return root / "snapshots" / commit


def test_the_hub_is_asked_for_a_plan_only_of_a_model_that_it_gave_at_that_commit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    commit, repo_id = "a" * 40, "somebody/embedder"
    folder = hub_repository(tmp_path, repo_id, commit)
    tiny_checkpoint(folder, "bert")
    model = AutoModel.from_pretrained(repo_id, cache_dir=tmp_path)
    if getattr(model.config, "_commit_hash", None) is None:
        # transformers 5.24 and later say nothing of where a model came from.
        with pytest.raises(PlanError, match=r"there is none\. .*\(model, folder or Hub id\)"):
            slimformer.patch(model, "auto")
        model.config._commit_hash = commit
    with pytest.raises(PlanError, match=f"could not say whether a plan lies with {repo_id}"):
        slimformer.patch(model, "auto")
    (folder.parents[1] / ".no_exist" / commit).mkdir(parents=True)
    (folder.parents[1] / ".no_exist" / commit / FILE).touch()
    with pytest.raises(PlanError, match=f"{repo_id} has none at the commit {commit}"):
        slimformer.patch(model, "auto")
    (folder.parents[1] / ".no_exist" / commit / FILE).unlink()
    Plan([DROP]).save_pretrained(folder)
    assert dropped(slimformer.patch(model)) == {}
    assert dropped(slimformer.patch(model, "auto")) == {1: ["attention"], 2: ["mlp"]}
    (folder / FILE).write_text("{")
    with pytest.raises(PlanError, match="damaged"):
        slimformer.patch(model, "auto")


def test_a_folder_that_is_gone_is_not_looked_for_on_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    tiny_checkpoint(tmp_path / "outdir" / "ck", "bert")
    model = AutoModel.from_pretrained("outdir/ck")
    shutil.rmtree(tmp_path / "outdir")
    # What a stranger would have to do: a repository of that name, with a plan in it.
    Plan([DROP]).save_pretrained(hub_repository(tmp_path / "hub", "outdir/ck", "b" * 40))
    assert dropped(slimformer.patch(model)) == {}
    with pytest.raises(PlanError, match=r"beside the checkpoint outdir/ck, and there is none"):
        slimformer.patch(model, "auto")
    with pytest.raises(PlanError, match="loaded from none"):
        slimformer.patch(tiny_model("bert"), "auto")


def test_a_patch_that_no_plan_can_hold_is_not_saved_and_says_so(tmp_path: Path) -> None:
    model = slimformer.patch(tiny(tmp_path / "from"), RandomKeep(0.5))
    with pytest.warns(SlimformerWarning, match="RandomKeep has no form"):
        model.save_pretrained(str(tmp_path / "to"))
    assert not (tmp_path / "to" / FILE).exists()
    slimformer.patch(model).save_pretrained(str(tmp_path / "lossless"))
    assert not (tmp_path / "lossless" / FILE).exists()


def test_a_checkpoint_is_not_uploaded_without_its_plan(tmp_path: Path) -> None:
    model = slimformer.patch(tiny_model("bert"), DROP)
    with pytest.raises(PlanError, match=r"model\.push_to_hub\(repo_id\), which uploads both"):
        model.save_pretrained(tmp_path, push_to_hub=True)
    assert list(tmp_path.iterdir()) == []
    model.save_pretrained(tmp_path, is_main_process=False)
    assert not (tmp_path / FILE).exists()


def test_a_cross_encoder_is_patched_in_place_and_saved_with_its_plan(tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path / "from", "bert")
    config = tiny_model("bert").config
    config.num_labels = 1
    AutoModelForSequenceClassification.from_config(config).save_pretrained(folder)
    model, pairs = CrossEncoder(folder, device="cpu"), [(a, b) for a in TEXTS[:4] for b in TEXTS[4:8]]
    dense = model.predict(pairs)
    with slimformer.patched(model):
        assert np.abs(model.predict(pairs, batch_size=3) - dense).max() < 1e-5
    assert slimformer.patch(model, DROP) is model
    slim = model.predict(pairs)
    assert np.abs(slim - dense).max() > 1e-5
    model.save_pretrained(str(tmp_path / "to"))
    assert np.array_equal(slimformer.unpatch(model).predict(pairs), dense)
    again = slimformer.patch(CrossEncoder(str(tmp_path / "to"), device="cpu"), "auto")
    assert np.abs(again.predict(pairs) - slim).max() < 1e-6


@pytest.mark.parametrize(("task", "name"), [("feature-extraction", "bert"), ("text-generation", "llama")])
def test_a_pipeline_is_patched_and_saved_with_its_plan(tmp_path: Path, task: str, name: str) -> None:
    made = pipeline(task, model=tiny_model(name), tokenizer=tiny_tokenizer())
    options = {"max_new_tokens": 8, "do_sample": False} if task == "text-generation" else {}

    def answers(of: object) -> object:
        return of(["a cat", "a longer text"], **options)

    dense = answers(made)
    assert slimformer.patch(made, DROP) is made
    slim = answers(made)
    made.save_pretrained(str(tmp_path))
    again = slimformer.patch(pipeline(task, model=str(tmp_path)), "auto")
    assert dropped(again) == {1: ["attention"], 2: ["mlp"]}
    if task == "text-generation":
        assert answers(again) == slim
    else:
        for found, wanted in zip(answers(again), slim, strict=True):
            torch.testing.assert_close(torch.tensor(found), torch.tensor(wanted), atol=1e-5, rtol=0)
    assert answers(slimformer.unpatch(made)) == dense


def test_a_generative_model_embeds_by_its_last_token(tmp_path: Path) -> None:
    for mode in ("lasttoken", "mean"):
        model = tiny(tmp_path / mode, "llama", mode)
        dense = model.encode(TEXTS)
        with slimformer.patched(model):
            assert np.abs(model.encode(TEXTS, batch_size=5) - dense).max() < 1e-5


def test_adapters_stay_in_use_and_plans_that_change_the_weights_under_them_are_refused(
    tmp_path: Path,
) -> None:
    model = tiny(tmp_path)
    base = model.encode(TEXTS)
    adapter = LoraConfig(r=2, target_modules=["query", "value"], init_lora_weights=False)
    inject_adapter_in_model(adapter, transformer_of(model))
    adapted = model.encode(TEXTS)
    assert not np.allclose(base, adapted)
    with slimformer.patched(model):
        assert worst_cosine(model.encode(TEXTS), adapted) >= 0.99999
    changed = {
        "1.attention.self.query.weight.left": torch.ones(32, 1),
        "1.attention.self.query.weight.right": torch.ones(1, 32),
    }
    with pytest.raises(PlanError, match="before adapters are put on it"):
        slimformer.patch(model, WeightDelta(changed))
    assert not slimformer.status(model)
    assert np.array_equal(model.encode(TEXTS), adapted)


def test_another_backend_is_refused_by_name(tmp_path: Path) -> None:
    transformer = Transformer(tiny_checkpoint(tmp_path, "bert"))
    model = SentenceTransformer(modules=[transformer, Pooling(32)], device="cpu", backend="onnx")
    with pytest.raises(
        UnsupportedModelError, match=r"SentenceTransformer runs on the backend 'onnx'.*backend='torch'"
    ):
        slimformer.patch(model)
    assert "_slimformer" not in vars(transformer.auto_model)


def test_a_plan_of_an_earlier_save_does_not_outlive_methods_that_no_plan_can_hold(tmp_path: Path) -> None:
    model = tiny_model("bert")
    slimformer.patch(model, EarlyExit(2)).save_pretrained(tmp_path)
    assert (tmp_path / "slimformer.json").exists()
    with pytest.warns(SlimformerWarning, match="written without a plan"):
        slimformer.patch(model, RandomKeep(0.5)).save_pretrained(tmp_path, True)
    assert not (tmp_path / "slimformer.json").exists()
