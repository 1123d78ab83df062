"""The one setting that the layer reads, at vLLM's default."""

VLLM_FUSED_MOE_CHUNK_SIZE = 32768
