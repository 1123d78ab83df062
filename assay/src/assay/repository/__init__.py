"""git as a store of bytes."""
