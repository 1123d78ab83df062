"""Campaigns: tasks by agents by attempts, canaries first, one row per finished cell, scores over them."""
