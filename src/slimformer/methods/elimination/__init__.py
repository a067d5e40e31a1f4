"""Tokens that no longer matter leave the stream: who they are, and from which layer on."""
