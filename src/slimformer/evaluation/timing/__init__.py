"""How fast a patched model is, in the situations that models are used in."""
