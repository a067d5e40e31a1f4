"""What is read, what parts cost on this machine, and what is lost without them."""
