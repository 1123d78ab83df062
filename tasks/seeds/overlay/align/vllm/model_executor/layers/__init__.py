"""Holds the wrapper."""
