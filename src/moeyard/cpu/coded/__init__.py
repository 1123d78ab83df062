"""Experts of quantised weights."""
