"""The panel: what a plan keeps of the dense model's capabilities, the worst of them counting as much as the mean."""

from slimformer.evaluation.panel.capabilities.yours import Prompt, read_prompts
from slimformer.evaluation.panel.capability import Capability, Kept
from slimformer.evaluation.panel.embeddings import embedding_panel
from slimformer.evaluation.panel.judgement import Judgement, equal
from slimformer.evaluation.panel.panel import Panel
from slimformer.evaluation.panel.sizes import PanelBudget

__all__ = [
    "Capability",
    "Judgement",
    "Kept",
    "Panel",
    "PanelBudget",
    "Prompt",
    "embedding_panel",
    "equal",
    "read_prompts",
]
