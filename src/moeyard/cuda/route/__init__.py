"""Routers: router_logits -> Routing, and with the alignment of few tokens in the same launch."""
