"""Workloads as data, providers of the same op side by side, and what becomes of their times."""
