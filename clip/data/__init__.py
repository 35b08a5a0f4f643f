"""Images with captions, in the order in which a training run sees them."""

from clip.data.batches import Batch, batches, in_order
from clip.data.pairs import FilePairs, Pairs, ScenePairs
from clip.data.splits import Splits, load_splits

__all__ = ["Batch", "FilePairs", "Pairs", "ScenePairs", "Splits", "batches", "in_order", "load_splits"]
