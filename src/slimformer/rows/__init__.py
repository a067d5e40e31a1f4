"""Which rows of the residual stream there are, and how norms, MLPs and attentions compute some of them."""
