"""What was exported, in the engines themselves; each skips where its engine is not installed."""
