"""Rows between GPUs of one host: pushed straight into the memory of the ranks that want them, and back."""
