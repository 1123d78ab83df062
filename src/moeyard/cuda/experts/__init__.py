"""Grouped products and experts on Hopper, and the experts of a few tokens."""
