"""Holds modules of the layer."""
