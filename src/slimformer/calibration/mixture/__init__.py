"""Text of several sources: the user's, built in, what the model writes itself, and sequences that repeat."""
