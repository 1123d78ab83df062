"""Is a task one at all? Static and measured reasons, and a record that expires."""
