"""Does assay keep its promises? Simulations, real experiments with a known truth, canaries, this machine."""
