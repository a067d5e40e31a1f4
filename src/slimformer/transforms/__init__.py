"""How attention's scores are changed."""
