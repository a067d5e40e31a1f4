"""Where a model keeps its parts, and what there is to compare computations on."""
