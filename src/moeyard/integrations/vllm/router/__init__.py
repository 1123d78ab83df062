"""vLLM's routers, one module per router as vLLM has them."""
