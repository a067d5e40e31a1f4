"""What does a plan become outside of slimformer? One file, one format, and what they share."""
