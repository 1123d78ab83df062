"""Processes that run somebody's code: started, held in, asked, frozen and ended."""
