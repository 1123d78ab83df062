"""How a call reaches an implementation: checks, the choice in one table, and one meaning for all callers."""
