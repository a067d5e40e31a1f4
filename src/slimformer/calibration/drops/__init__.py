"""Which sublayers need not be computed."""
