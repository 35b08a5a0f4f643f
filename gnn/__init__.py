"""Graph neural networks from scratch: node, link, graph and community tasks, from 34 nodes to 10^8 edges."""

from common.projects import Demo, Metric

METRICS = {
    "test_accuracy": Metric("Test accuracy", "higher", "percent", leads=True),
    "test_accuracy_*": Metric("Test accuracy {}", "", "percent"),
    "val_accuracy": Metric("Validation accuracy", "higher", "percent"),
    "cv_accuracy_*": Metric("Cv accuracy {}", "", "percent"),
    "test_macro_f1": Metric("Test macro-F1", "higher"),
    "auc": Metric("AUC", "higher", leads=True),
    "ap": Metric("Average precision", "higher"),
    "mrr": Metric("Mean reciprocal rank", "higher"),
    "modularity": Metric("Modularity", "higher"),
    "nmi": Metric("Normalised mutual information", "higher"),
    "ari": Metric("Adjusted Rand index", "higher"),
    "conductance": Metric("Conductance", "lower"),
}
DEMO = Demo("gnn", "configs/gcn_karate.yaml", seconds=20)
