"""The commands: a row per command in table.py."""
