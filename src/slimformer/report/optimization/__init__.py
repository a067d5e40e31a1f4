"""What an optimisation tried and chose: a table for a terminal, a section with a picture for the plan's page."""
