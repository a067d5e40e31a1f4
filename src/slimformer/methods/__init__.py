"""One file per method, one decision per file."""
