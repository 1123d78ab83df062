"""Arithmetic on log-ratios: one procedure for estimate, test and interval, and the verdict of a look."""
