"""Training of what is learned beside a frozen model."""
