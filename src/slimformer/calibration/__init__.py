"""What a plan is chosen by: measurements of a model on text."""
