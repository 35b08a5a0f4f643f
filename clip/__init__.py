"""Contrastive image-text learning from scratch: CLIP, SigLIP and LiT, trained and checked on one machine."""

from common.projects import Demo, Metric

METRICS = {
    "r10_mean": Metric("Recall@10, mean of both directions", "higher", "percent", leads=True),
    "r1_t2i": Metric("Recall@1, text to image", "higher", "percent", leads=True),
    "r5_t2i": Metric("Recall@5, text to image", "higher", "percent"),
    "r10_t2i": Metric("Recall@10, text to image", "higher", "percent"),
    "r1_i2t": Metric("Recall@1, image to text", "higher", "percent", leads=True),
    "r5_i2t": Metric("Recall@5, image to text", "higher", "percent"),
    "r10_i2t": Metric("Recall@10, image to text", "higher", "percent"),
    "median_rank_t2i": Metric("Median rank, text to image", "lower"),
    "median_rank_i2t": Metric("Median rank, image to text", "lower"),
    "pairs_*": Metric("Pairs told apart, {} (guessing: 17 percent)", "higher", "percent"),
    "r*_easy": Metric("Recall@{}, scenes drawn at random", "higher", "percent"),
    "r*_novel": Metric("Recall@{}, a combination never shown", "higher", "percent"),
    "r*_novel_only": Metric("Recall@{}, only combinations never shown", "higher", "percent"),
    "median_rank_*": Metric("Median rank, {}", "lower"),
    "zero_shot_top1": Metric("Zero-shot accuracy", "higher", "percent", leads=True),
}
DEMO = Demo("clip", "configs/clip_scenes_tiny.yaml", seconds=60)
