"""How a model is changed so that every change can be undone, switched off, and kept apart between calls."""
