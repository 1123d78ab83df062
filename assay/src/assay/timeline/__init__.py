"""Results over time: which commits of a range changed how long something takes."""
