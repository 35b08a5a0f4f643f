"""The metrics of a run as rows of a table."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from common.report.text import number, numeral, words

# name in eval.json -> (words, which way is better); names that are not here show as they are
METRICS = {
    "fid": ("FID", "lower"),
    "fd_floor": ("Fréchet distance of held-out images", "floor"),
    "inception_score": ("Inception score", "higher"),
    "classifier_score": ("Classifier score", "higher"),
    "conditional_accuracy": ("Accuracy of the requested class", "higher"),
    "classifier_test_accuracy": ("Test accuracy of the judging classifier", ""),
    "precision": ("Precision", "higher"),
    "recall": ("Recall", "higher"),
    "density": ("Density", "higher"),
    "coverage": ("Coverage", "higher"),
    "nearest_train_rms": ("Distance to the nearest training image", ""),
    "test_accuracy": ("Test accuracy", "higher"),
    "val_accuracy": ("Validation accuracy", "higher"),
    "test_macro_f1": ("Test macro-F1", "higher"),
    "ari": ("Adjusted Rand index", "higher"),
    "conductance": ("Conductance", "lower"),
    "auc": ("AUC", "higher"),
    "ap": ("Average precision", "higher"),
    "mrr": ("Mean reciprocal rank", "higher"),
    "modularity": ("Modularity", "higher"),
    "nmi": ("Normalised mutual information", "higher"),
    "return_mean": ("Mean return", "higher"),
    "return_mean_stochastic": ("Mean return, sampled actions", "higher"),
    "episodes_to_solve": ("Episodes to solve", "lower"),
    "elbo": ("ELBO (nats)", "higher"),
    "log_likelihood": ("Log-likelihood (nats)", "higher"),
    "bits_per_dim": ("Bits per dimension", "lower"),
    "mig": ("Mutual information gap", "higher"),
    "dci": ("DCI disentanglement", "higher"),
    "zero_shot_top1": ("Zero-shot accuracy", "higher"),
    "r1_t2i": ("Recall@1, text to image", "higher"),
    "r1_i2t": ("Recall@1, image to text", "higher"),
    "mrr_at_10": ("MRR@10", "higher"),
    "ndcg_at_10": ("nDCG@10", "higher"),
    "em_closed_book": ("Exact match, closed book", "higher"),
    "em_retrieved": ("Exact match, retrieved passages", "higher"),
    "em_gold": ("Exact match, gold passages", "higher"),
    "accuracy": ("Accuracy", "higher"),
    "matthews": ("Matthews correlation", "higher"),
    "bleu": ("BLEU", "higher"),
    "perplexity": ("Perplexity", "lower"),
    "nearest_train_rms_test_images": ("The same distance for held-out images", ""),
}
# the first two of these that a run has lead; a name with _ at its end is a prefix
HEADLINES = (
    "fid",
    "fd_",
    "conditional_accuracy",
    "test_accuracy",
    "auc",
    "return_mean",
    "elbo",
    "bits_per_dim",
    "zero_shot_top1",
    "r1_t2i",
    "recall_at_",
    "em_retrieved",
    "accuracy",
    "matthews",
    "bleu",
    "perplexity",
)


@dataclass
class Metric:
    """One row of the metrics table, as text."""

    label: str
    value: str
    better: str


def metric_rows(metrics: dict[str, Any]) -> tuple[list[Metric], list[Metric]]:
    """All metrics as rows, each beside its own `_std`; and the two that lead."""
    rows = {}
    for name, value in metrics.items():
        if number(value) is None or (name.endswith("_std") and name.removesuffix("_std") in metrics):
            continue
        label, better = describe(name)
        percent = "accuracy" in name
        spread_of = number(metrics.get(f"{name}_std"))
        text = numeral(value, percent) + (f" ± {numeral(spread_of, percent)}" if spread_of is not None else "")
        rows[name] = Metric(label, text, better)
    leading = [
        name
        for key in HEADLINES
        for name in rows
        if name == key or (key.endswith("_") and name.startswith(key) and name != "fd_floor")
    ]
    return list(rows.values()), [rows[name] for name in (leading or list(rows))[:2]]


def describe(name: str) -> tuple[str, str]:
    """Words for a metric's name, and which way is better: "lower", "higher", "floor" (what nothing can beat) or
    nothing.
    """
    if name in METRICS:
        return METRICS[name]
    for pattern, text, better in (
        (r"fd_(\w+)", "Fréchet distance, {}", "lower"),
        (r"recall_at_(\d+)", "Recall@{}", "higher"),
        (r"r(\d+_\w2\w)", "Recall@{}", "higher"),
        (r"f1_(\w+)", "F1, {}", "higher"),
    ):
        if match := re.fullmatch(pattern, name):
            return text.format(match.group(1).replace("_", " ")), better
    return words(name), ""
