"""A slim plan drafts what its dense self then checks: the same tokens, sooner."""
