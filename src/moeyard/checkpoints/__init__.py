"""Weights as checkpoints hold them -> ExpertWeights, converted once, when a model is loaded; and back."""

from moeyard.checkpoints.interleaved import experts_from_interleaved
from moeyard.checkpoints.load import load_experts
from moeyard.checkpoints.save import save_experts

__all__ = ["experts_from_interleaved", "load_experts", "save_experts"]
