"""Contrastive image-text learning from scratch: CLIP, SigLIP and LiT, trained and checked on one machine."""

from common.projects import Metric

METRICS = {
    "r1_t2i": Metric("Recall@1, text to image", "higher", "percent", leads=True),
    "r5_t2i": Metric("Recall@5, text to image", "higher", "percent"),
    "r10_t2i": Metric("Recall@10, text to image", "higher", "percent", leads=True),
    "r1_i2t": Metric("Recall@1, image to text", "higher", "percent", leads=True),
    "r5_i2t": Metric("Recall@5, image to text", "higher", "percent"),
    "r10_i2t": Metric("Recall@10, image to text", "higher", "percent", leads=True),
    "median_rank_t2i": Metric("Median rank, text to image", "lower"),
    "median_rank_i2t": Metric("Median rank, image to text", "lower"),
    "zero_shot_top1": Metric("Zero-shot accuracy", "higher", "percent", leads=True),
}
