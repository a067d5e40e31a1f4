"""How are decode steps run? From CUDA graphs over a cache that stays where it is, where that is possible."""
