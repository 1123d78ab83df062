"""Agents: command templates, their sandbox with one way out, budgets, redaction, and what becomes of a run."""
