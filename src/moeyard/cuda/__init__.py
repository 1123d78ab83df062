"""The `cuda` implementation: CUDA C++ compiled at first use (NVRTC), launched straight from Python (cuda.core)."""
