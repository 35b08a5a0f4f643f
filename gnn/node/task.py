"""Node classification on a whole graph at once.

Legend: N nodes, K classes, S augmentations.
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.config import require
from common.errors import ProjectError
from gnn.config import Config
from gnn.core.outputs import write_embeddings, write_predictions
from gnn.core.scores import accuracy, macro_f1
from gnn.data.datasets import load_graph, random_split
from gnn.model import build_model, consistency_loss
from gnn.task import Task


class NodeTask(Task):
    """A class for each node, from few labelled ones: the public split, or a random one that each trial draws anew."""

    def __init__(self, config: Config, device: torch.device) -> None:
        super().__init__(config, device)
        graph = load_graph(config)
        if graph.labels is None or graph.num_classes < 2:
            raise ProjectError(f"{graph.name}: node classification needs labels of at least two classes")
        self.random = config.data.split == "random" or not len(graph.train)
        if self.random:
            graph = random_split(graph, config.data, config.seed)  # also to find out now that it can be drawn
        require(
            len(graph.val) and len(graph.test),
            "data.split",
            f"{graph.name} has no validation or test nodes; use data.split=random",
        )
        self.whole = graph
        self.graph = graph.to(device)
        self.structure = graph.to(device).structure()

    def build(self, trial: int) -> nn.Module:
        """A network for this graph."""
        if self.random:
            self.graph = random_split(self.whole, self.config.data, self.seed_of(trial)).to(self.device)
        graph = self.graph
        self.train_labels = graph.labels[graph.train]
        self.val_labels = graph.labels[graph.val]
        return build_model(self.config.model, graph.num_features, graph.num_classes).to(self.device)

    def loss(self, net: nn.Module, step: int) -> Tensor:
        """Cross-entropy on the training nodes; GRAND's mean over S augmentations, and their consistency on all
        nodes.
        """
        graph = self.graph
        model = self.config.model
        if model.layer != "grand":
            return F.cross_entropy(net(graph.features, self.structure).index_select(0, graph.train), self.train_labels)
        logits = torch.stack([net(graph.features, self.structure) for _ in range(model.samples)])  # (S, N, K)
        known = logits[:, graph.train].flatten(0, 1)
        supervised = F.cross_entropy(known, self.train_labels.repeat(model.samples))
        weight = model.consistency * min(1.0, step / max(1, model.consistency_warmup))
        return supervised + weight * consistency_loss(logits, model.temperature)

    def validate(self, model: nn.Module) -> dict[str, float]:
        """Loss and accuracy on the validation nodes."""
        logits = model(self.graph.features, self.structure).index_select(0, self.graph.val)
        loss = F.cross_entropy(logits, self.val_labels).item()
        return {"criterion": loss, "val_loss": loss, "val_accuracy": accuracy(logits, self.val_labels)}

    def test(self, model: nn.Module) -> dict[str, float]:
        """Accuracy and macro-F1 on the test nodes, accuracy on the validation nodes."""
        graph = self.graph
        logits = model(graph.features, self.structure)
        labels = graph.labels[graph.test]
        return {
            "test_accuracy": accuracy(logits[graph.test], labels),
            "test_macro_f1": macro_f1(logits[graph.test], labels),
            "val_accuracy": accuracy(logits[graph.val], self.val_labels),
        }

    def write_outputs(self, model: nn.Module, folder: Path) -> None:
        """predictions.csv and embeddings.npz."""
        graph = self.graph
        write_predictions(folder / "predictions.csv", graph, model(graph.features, self.structure))
        write_embeddings(folder / "embeddings.npz", graph, model.hidden(graph.features, self.structure))

    def figures(self, model: nn.Module, folder: Path) -> None:
        """Embeddings coloured by class, errors, and, for attention, what the nodes listen to."""
        from gnn.core import pictures
        from gnn.node.pictures import draw_attention

        graph = self.graph
        hidden = model.hidden(graph.features, self.structure)
        logits = model(graph.features, self.structure)
        pictures.draw_embedding(folder / "embedding.png", hidden, graph.labels, f"hidden layer on {graph.name}, t-SNE")
        pictures.draw_confusion(
            folder / "confusion.png", logits[graph.test].argmax(dim=1), graph.labels[graph.test], graph.num_classes
        )
        if self.config.model.layer in ("gat", "gatv2"):
            draw_attention(folder / "attention.png", model, graph, self.structure)
        if graph.num_nodes <= 200:
            pictures.draw_graph(folder / "graph.png", graph, logits.argmax(dim=1))

    def describe(self) -> list[str]:
        """Sizes."""
        g = self.whole
        split = "drawn anew for each seed" if self.random else "public"
        return [
            f"{g.name}: {g.num_nodes:,} nodes, {g.num_edges:,} edges, {g.num_features:,} features "
            f"({type(g.features).__name__}), "
            f"{g.num_classes} classes",
            f"split ({split}): {len(g.train)} training, {len(g.val)} validation, {len(g.test)} test nodes",
            *g.notes,
        ]
