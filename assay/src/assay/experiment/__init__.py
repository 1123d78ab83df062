"""Blocks of paired samples, from the first input to the look that decides; RAW."""
