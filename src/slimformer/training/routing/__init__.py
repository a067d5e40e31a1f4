"""Routers that are trained beside a frozen model, and which layers they go into."""
