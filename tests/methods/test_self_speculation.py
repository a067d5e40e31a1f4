"""With drafts of a slim plan, `generate` gives what the model gives alone, in fewer steps."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, GenerationConfig, StaticCache, StoppingCriteriaList, TextStreamer
from transformers.generation.logits_process import LogitsProcessor, LogitsProcessorList

import slimformer
from slimformer import EarlyExit, LayerDrop, Plan, SelfSpeculation, TempScale
from slimformer.changes.running_calls import PATCH
from slimformer.errors import PlanError
from slimformer.methods import RopeScaling, WeightDelta
from slimformer.methods.speculation.pace import Pace
from slimformer.plans.plan import fingerprint
from tiny_models import tiny_model

DRAFT = LayerDrop(block=[2])
NEW = 40


def filters(taps: int) -> LayerDrop:
    generator = torch.Generator().manual_seed(3)
    weights = {"attention.1.weight": torch.randn(32, taps * 32, generator=generator) * 0.02,
               "attention.1.bias": torch.zeros(32)}  # fmt: skip
    return LayerDrop(attention=[1], replace="filter", taps=taps, weights=weights)


def delta() -> WeightDelta:
    return WeightDelta({"3.mlp.down_proj.weight.added": torch.full((32, 48), 1e-3)})


@pytest.fixture(autouse=True)
def eager(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drafts are made whether they pay or not: on a tiny model nothing does."""
    monkeypatch.setattr(Pace, "_judge", lambda self, step: None)
    monkeypatch.setattr(Pace, "goes_on", lambda self, chance: chance > 0.05)
    monkeypatch.setattr(Pace, "copies", lambda self: 4)


def prompt(tokens: int = 12, seed: int = 0) -> Tensor:
    return torch.randint(3, 64, (1, tokens), generator=torch.Generator().manual_seed(seed))


def generated(model: Any, ids: Tensor, **options: Any) -> Tensor:
    given = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": None, **options}
    return model.generate(ids, attention_mask=torch.ones_like(ids), **given)


def tally(model: Any) -> Any:
    return next(vars(m)[PATCH] for m in model.modules() if PATCH in vars(m)).reports["drafts"]


@pytest.mark.parametrize(
    "name", ["llama", "qwen2", "gemma2", "gemma3_text", "olmo2", "phi", "gpt2", "gpt_neox", "mixtral"]
)
def test_greedy_tokens_are_those_of_the_model_alone(name: str) -> None:
    model = tiny_model(name)
    expected = [generated(model, prompt(n, n)) for n in (1, 5, 30)]
    slimformer.patch(model, SelfSpeculation(DRAFT))
    for n, tokens in zip((1, 5, 30), expected, strict=True):
        assert torch.equal(generated(model, prompt(n, n)), tokens)
    counted = tally(model)
    assert counted.tokens == 3 * NEW
    assert counted.drafted > 20


@pytest.mark.parametrize(
    "draft",
    [LayerDrop(attention=[0, 3]), LayerDrop(mlp=[1]), EarlyExit(3), filters(1), filters(3), Plan([DRAFT, delta()]),
     Plan([DRAFT, TempScale(0.9)])],
    ids=["attention", "mlp", "exit", "filter", "taps", "repaired", "temperature"],
)  # fmt: skip
def test_every_kind_of_draft_leaves_the_tokens_as_they_are(draft: Any) -> None:
    model = tiny_model("llama")
    expected = generated(model, prompt())
    slimformer.patch(model, SelfSpeculation(draft))
    assert torch.equal(generated(model, prompt()), expected)
    assert tally(model).drafted > 5


@pytest.mark.parametrize(
    "beside",
    [
        LayerDrop(attention=[1]),
        filters(3),
        TempScale(0.8),
        delta(),
        RopeScaling("dynamic", 2.0, trained_length=14),
    ],
    ids=["drop", "taps", "scale", "delta", "positions"],
)
def test_beside_other_methods_tokens_are_those_of_the_others_alone(beside: Any) -> None:
    model = tiny_model("llama")
    expected = generated(slimformer.patch(model, beside), prompt())
    for methods in ((beside, SelfSpeculation(DRAFT)), (Plan([SelfSpeculation(DRAFT), beside]),)):
        slimformer.patch(model, *methods)
        assert torch.equal(generated(model, prompt()), expected)
        assert tally(model).drafted > 5


def test_a_perfect_draft_is_accepted_whole() -> None:
    model = tiny_model("llama")
    with torch.no_grad():
        for part in (model.model.layers[2].self_attn.o_proj, model.model.layers[2].mlp.down_proj):
            part.weight.zero_()
    slimformer.patch(model, SelfSpeculation(DRAFT))
    generated(model, prompt())
    counted = tally(model)
    assert counted.accepted == counted.drafted > 0
    assert counted.steps < NEW / 2


def test_what_stands_in_the_text_is_copied() -> None:
    model = tiny_model("llama")
    for layer in model.model.layers:
        # What comes next depends on the last token alone, so that the text runs in a circle.
        torch.nn.init.zeros_(layer.self_attn.o_proj.weight)
    expected = generated(model, prompt())
    slimformer.patch(model, SelfSpeculation(DRAFT))
    assert torch.equal(generated(model, prompt()), expected)
    counted = tally(model)
    assert counted.copied > 0
    assert counted.copies_accepted / counted.copied > 0.5


def test_sampled_tokens_have_the_distribution_of_the_model() -> None:
    # Two tokens behind a prompt, of a vocabulary of 6, against their exact chances.
    model, draws = tiny_model("llama", vocab_size=6, eos_token_id=None, initializer_range=0.3), 1000
    ids, counts, temperature = torch.tensor([[3, 5, 1, 4]]), torch.zeros(6, 6), 0.7
    with torch.no_grad():
        texts = torch.cat([ids.expand(6, -1), torch.arange(6)[:, None]], 1)
        chances = (model(texts).logits[:, 3:] / temperature).softmax(-1)
    expected = (chances[0, 0, :, None] * chances[:, 1] * draws).flatten()
    slimformer.patch(model, SelfSpeculation(LayerDrop(block=[1, 2])))
    torch.manual_seed(7)
    for _ in range(draws):
        # The first token is the prompt's own, and the draft may guess the second.
        found = generated(model, ids, max_new_tokens=3, do_sample=True, temperature=temperature, top_k=0)
        counts[found[0, 4], found[0, 5]] += 1
    assert tally(model).drafted > draws / 2
    assert 0.1 < tally(model).accepted / tally(model).drafted < 0.95
    # Cells that expect few draws are one.
    often = expected >= 5
    observed = torch.cat([counts.flatten()[often], counts.flatten()[~often].sum()[None]])
    wanted = torch.cat([expected[often], expected[~often].sum()[None]])
    statistic = float(((observed - wanted) ** 2 / wanted).sum())
    # A right sampler passes this in all but one of 10,000 seeds (Wilson and Hilferty).
    free = len(wanted) - 1
    assert statistic < free * (1 - 2 / (9 * free) + 3.72 * (2 / (9 * free)) ** 0.5) ** 3


def test_a_text_ends_where_the_model_ends_it() -> None:
    model = tiny_model("llama")
    alone = generated(model, prompt())
    ends = alone[0, 12 + 15].item()
    expected = generated(model, prompt(), eos_token_id=ends)
    slimformer.patch(model, SelfSpeculation(DRAFT))
    assert torch.equal(generated(model, prompt(), eos_token_id=ends), expected)
    for new in (1, 2, 3):
        assert torch.equal(generated(model, prompt(), max_new_tokens=new), alone[:, : 12 + new])


def test_left_padding_processors_and_scores_are_as_without_drafts() -> None:
    model = tiny_model("llama")
    ids = torch.cat([torch.zeros(1, 4, dtype=torch.long), prompt()], 1)
    mask = (ids != 0).long()
    options = {"attention_mask": mask, "max_new_tokens": NEW, "do_sample": False, "repetition_penalty": 1.3,
               "no_repeat_ngram_size": 3, "return_dict_in_generate": True, "output_scores": True}  # fmt: skip
    expected = model.generate(ids, **options)
    slimformer.patch(model, SelfSpeculation(DRAFT))
    found = model.generate(ids, **options)
    assert torch.equal(found.sequences, expected.sequences)
    torch.testing.assert_close(torch.stack(found.scores), torch.stack(expected.scores))
    assert tally(model).drafted > 5


def test_a_config_object_is_not_written_to() -> None:
    model = slimformer.patch(tiny_model("llama"), SelfSpeculation(DRAFT))
    config = GenerationConfig(max_new_tokens=8, do_sample=False)
    before = config.to_dict()
    model.generate(prompt(), generation_config=config)
    assert config.to_dict() == before
    assert not tally(model).without


class _Remembers(LogitsProcessor):
    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        return scores


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"num_beams": 3}, "beam"),
        ({"num_return_sequences": 2, "do_sample": True}, "2 texts"),
        ({"output_attentions": True, "return_dict_in_generate": True}, "attentions"),
        ({"use_cache": False}, "cache"),
        ({"cache_implementation": "static"}, "cache"),
        ({"logits_processor": LogitsProcessorList([_Remembers()])}, "logits processor"),
        (
            {"stopping_criteria": StoppingCriteriaList([lambda ids, scores: ids.new_zeros(len(ids)).bool()])},
            "stops",
        ),
        ({"prompt_lookup_num_tokens": 3}, "assisted"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_cannot_have_drafts_runs_without_and_says_why(options: dict[str, Any], why: str) -> None:
    model = tiny_model("llama")
    model.set_attn_implementation("eager")
    torch.manual_seed(1)
    expected = generated(model, prompt(), **options)
    slimformer.patch(model, SelfSpeculation(DRAFT))
    torch.manual_seed(1)
    found = generated(model, prompt(), **options)
    tokens = (t if isinstance(t, Tensor) else t.sequences for t in (found, expected))
    assert torch.equal(*tokens)
    assert tally(model).drafted == 0
    assert why in slimformer.status(model).generation["drafts"]


def test_several_texts_run_without_drafts() -> None:
    model = slimformer.patch(tiny_model("llama"), SelfSpeculation(DRAFT))
    generated(model, prompt().repeat(3, 1))
    assert "3 texts at once" in slimformer.status(model).generation["drafts"]


def test_a_cache_of_an_earlier_call_is_gone_on_with() -> None:
    model = tiny_model("llama")
    whole = generated(model, prompt(), max_new_tokens=2 * NEW)
    slimformer.patch(model, SelfSpeculation(DRAFT))
    cache = DynamicCache(config=model.config)
    begun = generated(model, prompt(), past_key_values=cache)
    assert torch.equal(generated(model, begun, past_key_values=cache), whole)
    assert tally(model).drafted > 10


def test_a_cache_from_elsewhere_is_refused_or_left_to_the_model() -> None:
    model = tiny_model("llama")
    cache = DynamicCache(config=model.config)
    begun = generated(model, prompt(), past_key_values=cache)
    slimformer.patch(model, LayerDrop(attention=[1]), SelfSpeculation(DRAFT))
    with pytest.raises(PlanError, match="not patched"):
        generated(model, begun, past_key_values=cache)
    static = StaticCache(config=model.config, max_cache_len=64)
    generated(model, prompt(), past_key_values=static)
    assert "cache" in tally(model).without


def test_tokens_are_streamed(capsys: pytest.CaptureFixture[str]) -> None:
    class Words:
        def decode(self, ids: Any, **options: Any) -> str:
            return "".join(f"{int(i)} " for i in ids)

    model = tiny_model("llama")
    expected = generated(model, prompt())
    slimformer.patch(model, SelfSpeculation(DRAFT))
    generated(model, prompt(), streamer=TextStreamer(Words(), skip_prompt=True))  # type: ignore[arg-type]
    assert [int(word) for word in capsys.readouterr().out.split()] == expected[0, 12:].tolist()


def test_a_draft_for_another_model_is_refused_when_the_model_is_patched() -> None:
    other = Plan([DRAFT], fingerprint(tiny_model("llama", num_hidden_layers=6)))
    for draft in (other, LayerDrop(block=[4])):
        with pytest.raises(PlanError, match=r"another model|has 4 layers"):
            slimformer.patch(tiny_model("llama"), SelfSpeculation(draft))


@pytest.mark.parametrize("draft", [LayerDrop(), TempScale(0.9), Plan([TempScale(0.9)])])
def test_a_draft_that_leaves_nothing_out_is_refused(draft: Any) -> None:
    with pytest.raises(PlanError, match=r"leaves nothing out|leaves something out"):
        slimformer.patch(tiny_model("llama"), SelfSpeculation(draft))


@pytest.mark.parametrize("draft", [3, None, SelfSpeculation(DRAFT)])
def test_what_is_no_plan_is_refused(draft: Any) -> None:
    with pytest.raises(PlanError, match="takes a plan"):
        SelfSpeculation(draft)


def test_an_encoder_generates_nothing() -> None:
    with pytest.raises(PlanError, match="generates none"):
        slimformer.patch(tiny_model("bert"), SelfSpeculation(DRAFT))


def test_unpatch_leaves_nothing_behind() -> None:
    model = tiny_model("llama")
    keys, expected = set(vars(model)), generated(model, prompt())
    slimformer.unpatch(slimformer.patch(model, SelfSpeculation(DRAFT)))
    assert set(vars(model)) == keys
    assert torch.equal(generated(model, prompt()), expected)


def test_a_plan_with_a_draft_is_saved_and_read(tmp_path: Path) -> None:
    model = tiny_model("llama")
    Plan([filters(2)], fingerprint(model)).save_pretrained(tmp_path / "draft")
    slimformer.patch(model, SelfSpeculation(tmp_path / "draft"))
    expected = generated(model, prompt())
    model.save_pretrained(tmp_path / "model")
    read = Plan.from_pretrained(tmp_path / "model")
    assert isinstance(read.methods[0], SelfSpeculation)
    assert torch.equal(
        read.methods[0].plan.methods[0].weights["attention.1.weight"],
        filters(2).weights["attention.1.weight"],
    )
    slimformer.patch(model, read)
    assert torch.equal(generated(model, prompt()), expected)


def test_the_draft_follows_new_weights_and_copies() -> None:
    model = slimformer.patch(tiny_model("llama"), SelfSpeculation(DRAFT))
    generated(model, prompt())
    torch.manual_seed(5)
    others = {key: torch.randn_like(value) * 0.1 for key, value in model.state_dict().items()}
    model.load_state_dict(others, assign=True)
    fresh = tiny_model("llama")
    fresh.load_state_dict(others)
    expected = generated(fresh, prompt())
    for one in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        before = tally(one).drafted
        assert torch.equal(generated(one, prompt()), expected)
        assert tally(one).drafted > before


def test_the_draft_has_no_weights_of_its_own() -> None:
    model = slimformer.patch(tiny_model("llama"), SelfSpeculation(DRAFT))
    own = {tensor.data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    draft = vars(model)["generate"].call.had.call.draft.model
    assert {tensor.data_ptr() for tensor in (*draft.parameters(), *draft.buffers())} == own
