"""What lies in a key-value cache."""
