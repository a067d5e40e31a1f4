"""How a choice is kept and shared."""
