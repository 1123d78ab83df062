"""Loggers of the standard library under vLLM's name for them."""

import logging


def init_logger(name: str) -> logging.Logger:
    """The logger of a module."""
    return logging.getLogger(name)
