"""What must hold beside speed: a file per gate, and a row per gate in table.py."""
