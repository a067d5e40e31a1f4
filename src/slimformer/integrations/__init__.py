"""What connects slimformer to other tools; each is an optional extra."""
