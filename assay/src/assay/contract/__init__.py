"""What files and commands say: tasks, plans, RAW, verdicts, outcomes, errors. Nothing here runs anything."""
