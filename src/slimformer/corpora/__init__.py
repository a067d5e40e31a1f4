"""How is a whole corpus embedded, so that a run that ends can go on: read, checked, embedded, written in shards."""
