"""Rows that are sent, gathered, summed and quantised."""
