"""From raw sources to rows: `packages` fetch, `chitchat` and `ratings` parse, `formats` checks."""
