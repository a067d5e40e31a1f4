"""An exported model has a card of its own, in which what somebody wrote stays."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import ModelCard

import slimformer
from slimformer import LayerDrop, Plan
from tiny_checkpoints import tiny_checkpoint


def test_an_export_has_a_card_of_its_own(tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path / "whole", "llama")
    (tmp_path / "whole/README.md").write_text("---\nlicense: mit\ndatasets:\n- x\n---\n# Buy my course\n")
    (tmp_path / "whole/LICENSE").write_text("MIT")
    measured = {"panel": {"score": 0.9, "capabilities": {"copying": {"kept": 0.875, "spread": 0.01}}}}
    base = {"id": "org/whole", "name": "whole", "pipeline_tag": "text-generation"}
    plan = Plan([LayerDrop(block=[1])], provenance={"base_model": base}, measured=measured)
    slimformer.export(folder, plan, tmp_path / "slim")
    card = ModelCard.load(tmp_path / "slim/README.md")
    assert card.data.to_dict() == {
        "library_name": "transformers",
        "base_model": "org/whole",
        "license": "mit",
        "pipeline_tag": "text-generation",
        "tags": ["slimformer", "pruned"],
    }
    assert "3 of its 4 layers" in card.text
    assert "| copying | 87.5% | 1.0 |" in card.text
    assert 'LlamaForCausalLM.from_pretrained("slim")' in card.text
    assert "course" not in card.text
    assert (tmp_path / "slim/LICENSE").read_text() == "MIT"
    # What somebody adds stays when the export is made again.
    (tmp_path / "slim/README.md").write_text(f"{card}\nMine.\n")
    slimformer.export(folder, LayerDrop(block=[2]), tmp_path / "slim", force=True)
    assert "Mine." in (tmp_path / "slim/README.md").read_text()
    assert "1 whole layers: 2" in (tmp_path / "slim/README.md").read_text()
