"""Alignment: topk_ids -> Layout."""
