"""From a task and a patch to a typed outcome."""
