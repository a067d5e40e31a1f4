"""How fast a repair reads text, on as many GPUs as it is launched on: seconds per step without what is done once.

`python -m gpu.repair_speed FILE.json` measures one GPU, `accelerate launch --multi_gpu --num_processes 2 -m
gpu.repair_speed FILE.json` two, and `python -m gpu.repair_speed --compare ONE.json TWO.json` says how many times the
throughput is. Random weights of a 1B Llama's shape: what is trained costs what it costs with any others.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import string
import sys
import time
from pathlib import Path

import accelerate
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import slimformer
from slimformer import LayerDrop, Plan
from slimformer.training.loop import TrainingSettings
from tiny_checkpoints import tiny_tokenizer

AT_LEAST = 1.7
_SIZES = {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22, "num_attention_heads": 32,
          "num_key_value_heads": 4, "vocab_size": 32000, "max_position_embeddings": 2048}  # fmt: skip
_TINY = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4,
         "num_key_value_heads": 2, "vocab_size": 64, "max_position_embeddings": 128}  # fmt: skip


def measured(tiny: bool) -> dict[str, float]:
    """Seconds per step of this process and all beside it, from two repairs of different length."""
    state = accelerate.PartialState(cpu=tiny)
    config = LlamaConfig(**(_TINY if tiny else _SIZES), pad_token_id=0, bos_token_id=1, eos_token_id=2)
    torch.manual_seed(0)
    with state.device:
        model = LlamaForCausalLM._from_config(config, dtype=torch.float32 if tiny else torch.bfloat16).eval()
    rows, length = (2, 32) if tiny else (12, 1024)
    few, many = (2, 6) if tiny else (4, 28)
    plan = Plan(
        [LayerDrop(attention=range(config.num_hidden_layers // 4, 3 * config.num_hidden_layers // 4))]
    )
    tokenizer = tiny_tokenizer()
    # It promises short texts only, and rows would be cut to that.
    tokenizer.model_max_length = config.max_position_embeddings
    letters = random.Random(0)
    # Enough for every process to read other rows in every step.
    texts = ["".join(letters.choices(string.ascii_letters + " ", k=length)) for _ in range(2 * rows * many)]

    def seconds(steps: int) -> float:
        settings = TrainingSettings(
            steps=steps, rows=rows, learning_rate=1e-5, precision="no" if tiny else "bf16", keep_every=10_000
        )
        start = time.perf_counter()
        slimformer.repair(
            model,
            plan,
            tokenizer,
            data=texts,
            near=None,
            length=length,
            every=10_000,
            settings=settings,
        )
        if not tiny:
            torch.cuda.synchronize()
        state.wait_for_everyone()
        return time.perf_counter() - start

    seconds(few)
    short, long = seconds(few), seconds(many)
    step = (long - short) / (many - few)
    tokens = rows * length * state.num_processes
    return {
        "processes": state.num_processes, "seconds_per_step": step, "tokens_per_second": tokens / step,
        "seconds": long, "steps": many,
    }  # fmt: skip


def main() -> int:
    """Measure, or compare: 1 where two GPUs give less than 1.7 times one."""
    parser = argparse.ArgumentParser()
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--compare", action="store_true")
    parser.add_argument("--tiny", action="store_true", help="on the CPU: try the code, not the speed")
    options = parser.parse_args()
    if options.compare:
        one, two = (json.loads(path.read_text(encoding="utf-8")) for path in options.files)
        ratio = two["tokens_per_second"] / one["tokens_per_second"]
        print(
            f"{two['processes']} processes: {ratio:.2f} times {one['processes']}, at least {AT_LEAST} expected"
        )
        return int(ratio < AT_LEAST or two["processes"] != 2 * one["processes"])
    found = measured(options.tiny)
    if int(os.environ.get("RANK", "0")) == 0:
        options.files[0].write_text(json.dumps(found, indent=1), encoding="utf-8")
        print(found, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
