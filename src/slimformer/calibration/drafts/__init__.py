"""Which plan drafts best for its dense self: acceptance and cost together, as measured here."""
