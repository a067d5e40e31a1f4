"""How good and how fast a patched model is beside the dense one."""
