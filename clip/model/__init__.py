"""The two towers and what they read: pixels prepared, texts as tokens."""

from clip.model.dual_encoder import CLIP, MAX_LOG_SCALE, Output, parameter_groups

__all__ = ["CLIP", "MAX_LOG_SCALE", "Output", "parameter_groups"]
