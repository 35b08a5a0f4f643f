"""The two towers and what they read: pixels prepared, texts as tokens."""

from clip.model.dual_encoder import CLIP, Output, parameter_groups

__all__ = ["CLIP", "Output", "parameter_groups"]
