"""Retrieval-augmented generation whose benefit is measured: search from scratch, a trained retriever, a reader."""

from common.projects import Demo, Metric

ARMS = {
    "bm25": "BM25",
    "zero_shot": "encoder as it came",
    "trained": "trained encoder",
    "hybrid": "hybrid",
    "reranked": "hybrid, ranked again",
}
METRICS = {
    "recall_at_1": Metric("Recall@1", "higher", "percent", leads=True),
    "recall_at_20": Metric("Recall@20", "higher", "percent"),
    "mrr_at_10": Metric("MRR@10", "higher"),
    "ndcg_at_10": Metric("nDCG@10", "higher", leads=True),
    "ndcg_at_10_low": Metric("nDCG@10, lower end of the 95 % interval"),
    "ndcg_at_10_high": Metric("nDCG@10, upper end of the 95 % interval"),
    **{f"ndcg_at_10_{arm}": Metric(f"nDCG@10, {label}", "higher") for arm, label in ARMS.items()},
    **{f"mrr_at_10_{arm}": Metric(f"MRR@10, {label}", "higher") for arm, label in ARMS.items()},
    "ndcg_at_10_*": Metric("nDCG@10, {}", "higher"),
    "recall_at_*": Metric("Recall at {}", "higher", "percent"),
    "hit_at_*": Metric("Any right passage among the first {}", "higher", "percent"),
    "answer_at_*": Metric("Answer's words among the first {}", "higher", "percent"),
    "*_difference": Metric("Difference, {}", "higher"),
    "*_low": Metric("Lower end of the 95 % interval, {}"),
    "*_high": Metric("Upper end of the 95 % interval, {}"),
    "*_p": Metric("Two-sided p, {}", "lower"),
    "ms_*": Metric("Milliseconds a question, {}", "lower"),
}
DEMO = Demo("rag", "configs/rag_factworld_tiny.yaml", seconds=60)
