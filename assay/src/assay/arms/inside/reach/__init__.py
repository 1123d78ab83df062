"""A folder that is put on the path of an arm whose lines are noted."""
