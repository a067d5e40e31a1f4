"""The plugin by which vLLM serves what `slimformer export --to vllm` wrote, in every process that vLLM starts."""

from __future__ import annotations

from slimformer.exporting.configs import SLIM, register_configs


def register() -> None:
    """Register configs and architectures; vLLM calls it by its entry point, in some processes more than once."""
    # Only where vLLM is: this module is read to find the plugin.
    from vllm import ModelRegistry  # noqa: PLC0415

    register_configs()
    for _, architecture in SLIM.values():
        ModelRegistry.register_model(architecture, f"slimformer.integrations.vllm_models:{architecture}")
