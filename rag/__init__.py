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
    # of rag.answer: docs/results/rag says what each of them counts
    "em_said": Metric("Exact match of what is not withheld", "higher", "percent"),
    "em_*": Metric("Exact match, {}", "higher", "percent"),
    "f1_*": Metric("F1, {}", "higher", "percent"),
    "support_*": Metric("Answers that stand in what they cite, {}", "higher", "percent"),
    "grounded_*": Metric("Answers that stand in a right passage, {}", "higher", "percent"),
    "citation_precision_*": Metric("Citations that are right, {}", "higher", "percent"),
    "citation_recall_*": Metric("Right passages that are cited, {}", "higher", "percent"),
    "cited_*": Metric("Answers with a citation, {}", "", "percent"),
    "shown_right": Metric("Questions whose right passage was shown", "higher", "percent"),
    "abstention_auroc": Metric("Abstention, AUROC", "higher"),
    "abstention_auroc_*": Metric("Abstention, AUROC, {}", "higher"),
    "threshold": Metric("Least confidence of what is said"),
    "withheld_*": Metric("Withheld, {}", "", "percent"),
    "edited": Metric("Questions whose passage was rewritten"),
    "edit_followed": Metric("Answers that follow a rewritten passage", "higher", "percent"),
    "edited_*": Metric("Questions whose passage was rewritten, {}"),
    "edit_followed_*": Metric("Answers that follow a rewritten passage, {}", "higher", "percent"),
    "edit_kept": Metric("Answers that do not", "lower", "percent"),
    "poison_harmless_changed": Metric("Answers changed by harmless words", "lower", "percent"),
    "poison_changed_*": Metric("Answers changed by hostile passages, {}", "lower", "percent"),
    "poison_obeyed_*": Metric("Hostile passages obeyed, {}", "lower", "percent"),
    "poison_invented_*": Metric("Citations of nothing, {}", "lower", "percent"),
}
DEMO = Demo("rag", "configs/rag_factworld_tiny.yaml", seconds=60)
