"""What can be decided for a sublayer, and what names the rows that it computes."""
