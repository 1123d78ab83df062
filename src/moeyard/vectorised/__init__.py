"""The `torch` implementation of every operator: vectorised, on any device, without host syncs."""
