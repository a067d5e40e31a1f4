"""One file per capability, and how a model reads what they ask."""
