"""A disk that fills up while a model is written: the error says so, and only the earlier export is there."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tiny_checkpoints import bpe_checkpoint

# In a mount of its own, which is gone with the process: what is there before and after, and what is said.
_PROGRAM = """
import os, sys, slimformer
whole, place, to = sys.argv[1:]
slimformer.export(whole, slimformer.LayerDrop(block=[0, 1, 2]), place + "/slim", to=to)
before = {path: os.stat(os.path.join(place, "slim", path)).st_size for path in os.listdir(place + "/slim")}
try:
    slimformer.export(whole, slimformer.LayerDrop(block=[1]), place + "/slim", to=to, force=True)
except slimformer.errors.ExportError as error:
    print(error)
after = {path: os.stat(os.path.join(place, "slim", path)).st_size for path in os.listdir(place + "/slim")}
print(os.listdir(place), before == after)
"""


@pytest.mark.parametrize("to", ["checkpoint", "vllm", "gguf"])
def test_a_full_disk_leaves_nothing_half_written_and_the_earlier_export(to: str, tmp_path: Path) -> None:
    alone = ["unshare", "--user", "--map-root-user", "--mount"]
    if shutil.which("unshare") is None or subprocess.run([*alone, "true"], check=False).returncode:
        pytest.skip("no mounts of one's own here")
    whole = bpe_checkpoint(tmp_path / "whole", "llama", hidden_size=128, intermediate_size=512)
    (tmp_path / "disk").mkdir()
    # Room for one layer and half of three.
    script = 'mount -t tmpfs -o size=2500k none "$1" && exec "$2" -c "$3" "$4" "$1" "$5"'
    run = [*alone, "sh", "-c", script, "sh", str(tmp_path / "disk"), sys.executable, _PROGRAM, whole, to]
    done = subprocess.run(run, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    said, left = done.stdout.strip().splitlines()
    assert "could not be written" in said
    assert "Nothing is left of it" in said
    assert left == "['slim'] True"
