"""Files that start by path in another process, with the standard library alone."""
