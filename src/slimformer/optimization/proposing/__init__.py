"""The programme over costs and losses, and the rounds in which it proposes and learns."""
