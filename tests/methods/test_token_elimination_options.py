"""How tokens are chosen and what becomes of the others: tokens that come back, protection, thresholds, predictors."""

from __future__ import annotations

import math
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tests.methods.test_token_elimination import TOKENS, ids, mask_of, not_evicted, only
from torch import Tensor

import slimformer
from slimformer import LayerDrop, Plan, TokenElimination
from slimformer.errors import PlanError
from slimformer.methods.elimination.block_predictor import BlockPredictor
from slimformer.methods.elimination.random_keep import chances
from slimformer.model.layer_parts import KINDS, Kind
from slow_rows import LAYOUTS, batch, error, one_thread, outputs, positions, slowly, small  # noqa: F401
from tiny_models import tiny_model

SHORT: dict[str, Any] = {"least": 8, "window": 3, "sink": 2}
CLOSE = 1e-5


def chosen(keep: float, mask: Tensor) -> Tensor:
    """Those of every text that `scorer="random"` chooses, bool `[batch, tokens]`; short texts keep all."""
    out = torch.zeros_like(mask, dtype=torch.bool)
    for row, real in zip(out, mask.bool(), strict=True):
        where = real.nonzero().squeeze(1)
        row[where if len(where) < 8 else where[not_evicted(len(where), keep)]] = True
    return out


@pytest.mark.parametrize("kinds", [("attention", "mlp"), ("mlp",), ("attention",)], ids="+".join)
@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt_neox", "olmo2", "bert", "mpnet", "modernbert"])
def test_tokens_that_may_come_back_pass_sublayers_by(name: str, kinds: tuple[Kind, ...]) -> None:
    model = small(name)
    method = TokenElimination({1: 0.6, 3: 0.5}, scorer="random", revivable=True, kinds=kinds, **SHORT)
    for layout in LAYOUTS:
        given = batch(name, layout)
        mask = given["attention_mask"]
        keep = {
            (layer, kind): chosen(0.5 if layer == 3 else 0.6, mask) for layer in (1, 2, 3) for kind in kinds
        }
        with slowly(model, keep):
            expected = outputs(model, given)
        with slimformer.patched(model, method):
            actual = outputs(model, given)
        assert error(actual, expected, mask) <= CLOSE
        assert error(actual, outputs(model, given), mask) > 0.05


def test_tokens_that_come_back_are_in_every_cache_and_decode_computes_all() -> None:
    model = tiny_model("llama")
    method = TokenElimination({1: 0.5}, scorer="random", revivable=True, **SHORT)
    with torch.no_grad():
        slimformer.patch(model, method)
        first = model(ids(1, TOKENS), use_cache=True)
        cache = first.past_key_values
        step = model(ids(1, TOKENS + 1)[:, TOKENS:], past_key_values=cache, use_cache=True)
        assert [layer.get_seq_length() for layer in cache.layers] == [TOKENS + 1] * 4
        slimformer.unpatch(model)
        mask = torch.ones(1, TOKENS + 1, dtype=torch.long)
        keep = F.pad(chosen(0.5, mask[:, :TOKENS]), (0, 1), value=True)
        with slowly(model, {(layer, kind): keep for layer in (1, 2, 3) for kind in KINDS}):
            expected = model(ids(1, TOKENS + 1)).logits
    torch.testing.assert_close(step.logits[:, -1], expected[:, -1], atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", ["bert", "distilbert", "mpnet", "roberta"])
def test_mean_pooling_over_everything_is_then_over_what_stayed(name: str) -> None:
    model, mask = tiny_model(name), mask_of(0, 5, 11).flip(1)
    kept = chosen(0.4, mask)
    both = []
    for left_as in ("residual", "mean"):
        method = TokenElimination({2: 0.4}, scorer="random", left_as=left_as, **SHORT)
        with slimformer.patched(model, method), torch.no_grad():
            both.append(model(ids()[:, :TOKENS], attention_mask=mask).last_hidden_state)
    residual, mean = both
    for row in range(3):
        real = mask[row].bool()
        torch.testing.assert_close(mean[row, kept[row]], residual[row, kept[row]], atol=0, rtol=0)
        expected = residual[row, kept[row]].mean(0)
        torch.testing.assert_close(mean[row, real].mean(0), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("beams", [1, 2])
def test_protected_tokens_stay_in_prompts_chunks_and_beams(beams: int) -> None:
    model, text, protect = tiny_model("llama"), ids(2, 40), torch.zeros(2, 36, dtype=torch.bool)
    protect[:, [5, 9, 14, 27]] = True
    method = TokenElimination({2: 0.4}, scorer="random", **SHORT)
    slimformer.patch(model, method)
    with torch.no_grad(), method.protecting(protect):
        rows = text.repeat_interleave(beams, 0)
        first = model(rows[:, :20], use_cache=True)
        second = model(rows[:, 20:], past_key_values=first.past_key_values, use_cache=True).logits
    slimformer.unpatch(model)
    parts = []
    for start, own in ((0, [5, 9, 14]), (20, [7])):
        # Protection comes on top of what the scores choose.
        parts.append(start + torch.cat([not_evicted(20, 0.4), torch.tensor(own)]).unique())
    with torch.no_grad(), only(model, 2, torch.cat(parts)):
        expected = model(text[:1], use_cache=False).logits
    torch.testing.assert_close(second[0, -1], expected[0, -1], atol=1e-5, rtol=0)
    assert second.shape[0] == 2 * beams


def test_a_mask_that_fits_no_batch_is_refused() -> None:
    method = TokenElimination({2: 0.4}, scorer="random", **SHORT)
    model = slimformer.patch(tiny_model("llama"), method)
    with pytest.raises(PlanError, match="bool tensor"), method.protecting(torch.ones(1, 4)):
        pass
    with (
        method.protecting(torch.ones(2, TOKENS, dtype=torch.bool)),
        pytest.raises(PlanError, match="2 texts"),
        torch.no_grad(),
    ):
        model(ids(3, TOKENS))


@pytest.mark.parametrize("scorer", ["attention", "predictor"])
def test_thresholds_keep_by_the_mean_score(scorer: Any) -> None:
    model, weights = tiny_model("llama"), BlockPredictor(32, 8, 4).tensors(2)
    common: dict[str, Any] = {"scorer": scorer, "threshold": True, "weights": weights, **SHORT}
    with torch.no_grad():
        dense = model(ids(1, TOKENS)).logits
        with slimformer.patched(model, TokenElimination({2: 1e-9}, asking="all", **common)):
            if scorer == "attention":
                torch.testing.assert_close(model(ids(1, TOKENS)).logits, dense, atol=1e-5, rtol=0)
        with slimformer.patched(model, TokenElimination({2: 1e9}, **common)):
            slim = model(ids(1, TOKENS)).logits
        with only(model, 2, torch.tensor([0, 1, *range(TOKENS - 3, TOKENS)])):
            expected = model(ids(1, TOKENS), use_cache=False).logits
    torch.testing.assert_close(slim[0, -1], expected[0, -1], atol=1e-5, rtol=0)


def test_blocks_stay_or_go_as_a_whole() -> None:
    model = tiny_model("llama")
    method = TokenElimination({2: 0.5}, scorer="random", block=4, least=8, window=1, sink=0)
    place = torch.arange(TOKENS)
    score = chances(place, 0).float().view(-1, 4).mean(1)
    score[-1] = math.inf  # the window is in it
    best = score.argsort(descending=True)[:3].sort().values
    stay = (best[:, None] * 4 + torch.arange(4)).flatten()
    with torch.no_grad():
        with slimformer.patched(model, method):
            slim = model(ids(1, TOKENS)).logits
        with only(model, 2, stay):
            expected = model(ids(1, TOKENS), use_cache=False).logits
    torch.testing.assert_close(slim[0, -1], expected[0, -1], atol=1e-5, rtol=0)


def predicted(model: Any, predictor: BlockPredictor, layer: int, text: Tensor, asking: str) -> Tensor:
    """Scores of a text's blocks by the documentation, from the residual in front of a layer."""
    with torch.no_grad():
        hidden = model(text, output_hidden_states=True).hidden_states[layer]
        h = model.model.layers[layer].input_layernorm(hidden)[0]
        towers = []
        for tower in (predictor.query, predictor.key):
            neurons = tower.first(h).relu()
            blocks = [neurons[start : start + 64].amax(0) for start in range(0, len(h), 64)]
            towers.append(tower.last(torch.stack(blocks)))
        query, key = towers
        # Near blocks get more attention than far ones, whatever is in them.
        block = torch.arange(len(query))
        matrix = query @ key.T / 2 + predictor.near[(block[:, None] - block).abs()]
        matrix = matrix.relu().tril()
    return matrix[-2:].sum(0) if asking == "last" else matrix.sum(0)


@pytest.mark.parametrize("asking", ["last", "all"])
def test_a_predictor_chooses_blocks_by_its_scores(asking: Any) -> None:
    torch.manual_seed(3)
    model, text, predictor = tiny_model("llama"), ids(1, 300), BlockPredictor(32, 8, 4).eval()
    with torch.no_grad():
        predictor.near.normal_()
    score = predicted(model, predictor, 2, text, asking)
    score[-1] = math.inf  # the window
    best = score.argsort(descending=True)[:2].sort().values
    stay = (best[:, None] * 64 + torch.arange(64)).flatten()
    stay = stay[stay < 300]
    method = TokenElimination(
        {2: 100 / 300},
        scorer="predictor",
        block=64,
        sink=0,
        window=1,
        asking=asking,
        weights=predictor.tensors(2),
    )
    with torch.no_grad():
        with slimformer.patched(model, method):
            slim = model(text).logits
        with only(model, 2, stay):
            expected = model(text, use_cache=False).logits
    torch.testing.assert_close(slim[0, -1], expected[0, -1], atol=1e-5, rtol=0)


def test_a_predictor_treats_a_text_alike_alone_and_among_others() -> None:
    model, mask = tiny_model("llama"), mask_of(0, 50, 161, tokens=300)
    method = TokenElimination(
        {1: 0.7, 2: 0.4},
        scorer="predictor",
        weights={**BlockPredictor(32, 8, 4).tensors(1), **BlockPredictor(32, 8, 4).tensors(2)},
        least=100,
        window=8,
    )
    slimformer.patch(model, method)
    with torch.no_grad():
        together = model(ids(3, 300), attention_mask=mask, position_ids=positions(mask)).logits
        for row, padding in enumerate((0, 50, 161)):
            alone = model(ids(3, 300)[row : row + 1, padding:]).logits
            torch.testing.assert_close(together[row, -1], alone[0, -1], atol=1e-5, rtol=0)


def test_plans_carry_predictors(tmp_path: Path) -> None:
    model, weights = tiny_model("llama"), BlockPredictor(32, 8, 4).tensors(2)
    method = TokenElimination({2: 0.4}, scorer="predictor", weights=weights, **SHORT)
    Plan([LayerDrop(mlp=[1]), method]).save_pretrained(tmp_path)
    with torch.no_grad():
        expected = slimformer.patch(model, LayerDrop(mlp=[1]), method)(ids()).logits
        assert torch.equal(slimformer.patch(model, tmp_path)(ids()).logits, expected)


def test_neurons_that_are_never_used_are_not_saved_and_nobody_misses_them() -> None:
    torch.manual_seed(0)
    predictor, h = BlockPredictor(16, 40, 4), torch.randn(3, 200, 16)
    text, place = torch.ones(3, 200, dtype=torch.bool), torch.arange(200).expand(3, 200)
    with torch.no_grad():
        predictor.query.first.bias[:10] = -100.0
        for _ in range(400):
            predictor(h, text, place)
        predictor.retire(share=0.99, least=4)
        used = predictor.sizes
        assert used[0] == 30
        saved = BlockPredictor.from_tensors(predictor.tensors(3), 3)
        assert (saved.query.first.out_features, saved.key.first.out_features) == used
        torch.testing.assert_close(saved(h, text, place), predictor(h, text, place), atol=1e-5, rtol=0)
        predictor.retire(share=0.0, least=4)
    assert predictor.sizes == (4, 4)


def test_scores_of_a_padded_text_are_those_of_the_text_alone() -> None:
    predictor, h, text = (
        BlockPredictor(8, 6, 4).eval(),
        torch.randn(2, 300, 8),
        mask_of(0, 100, tokens=300).bool(),
    )
    together = predictor(h, text, positions(text.long()))
    for row, start in ((0, 0), (1, 100)):
        alone = h[row : row + 1, start:]
        whole = torch.ones(alone.shape[:2], dtype=torch.bool)
        expected = predictor(alone, whole, positions(whole.long()))
        blocks = expected.shape[1]
        torch.testing.assert_close(together[row, :blocks, :blocks], expected[0])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"schedule": {1: 0.5}, "kinds": ["mlp"]}, "Add revivable=True"),
        ({"schedule": {1: 0.5}, "kinds": ["head"]}, "some of attention, mlp"),
        ({"schedule": {1: 0.5}, "revivable": True, "left_as": "mean"}, "none does"),
        ({"schedule": {1: 0.5}, "threshold": True, "scorer": "norm"}, "Use 'attention' or 'predictor'"),
        ({"schedule": {1: 2.0, 2: 1.5}, "threshold": True}, "must not fall"),
        ({"schedule": {1: 0.5}, "scorer": "predictor"}, "no trained predictor for layer 1"),
        ({"schedule": {1: 0.5}, "asking": "first"}, "one of None, last, all"),
        ({"schedule": {1: 0.5}, "left_as": "nothing"}, "one of residual, mean"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        TokenElimination(**settings)


def test_a_predictor_for_another_width_is_refused() -> None:
    method = TokenElimination(
        {1: 0.5}, scorer="predictor", weights=BlockPredictor(48, 8, 4).tensors(1), **SHORT
    )
    with pytest.raises(
        PlanError, match="predictor of layer 1 is for a hidden size of 48, and LlamaModel has 32"
    ):
        slimformer.patch(tiny_model("llama"), method)
    damaged = {**BlockPredictor(32, 8, 4).tensors(1), "1.query.last.bias": torch.zeros(3)}
    with pytest.raises(PlanError, match="damaged"):
        TokenElimination({1: 0.5}, scorer="predictor", weights=damaged)


@pytest.mark.parametrize("scorer", ["attention", "norm", "random"])
def test_patched_models_travel_to_other_processes(scorer: Any) -> None:
    model = slimformer.patch(tiny_model("llama"), TokenElimination({2: 0.4}, scorer=scorer, **SHORT))
    other = pickle.loads(pickle.dumps(model))
    with torch.no_grad():
        assert torch.equal(other(ids()).logits, model(ids()).logits)
