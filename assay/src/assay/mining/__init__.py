"""From commits, records and prompts to tasks: what they say, what becomes of it, what is not known."""
