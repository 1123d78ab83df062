"""Prompts: Jinja templates, what each of them tells an agent, and how much of the reference that is."""
