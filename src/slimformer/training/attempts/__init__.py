"""Training that looks for the rate it learns at, and says so where nothing was learnt."""
