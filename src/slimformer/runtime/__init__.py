"""How a patched layer does what was decided for its sublayers."""
