"""Whether a model computes what its parts suggest, and so what slimformer can do with it."""
