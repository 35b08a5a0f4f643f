"""Communities of one graph without labels: trained by modularity, compared with methods that need no training.

Labels are read by `test`, `tables` and `figures` alone; training and the choice of the weights see edges and features.

Legend: N nodes, k communities.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from common.config import require
from common.errors import ProjectError
from gnn.community import metrics
from gnn.community.dmon import DMoN, dmon_loss, harden, soft_modularity
from gnn.community.louvain_leiden import leiden, louvain
from gnn.community.spectral import spectral_communities
from gnn.config import Config
from gnn.core.graph import Graph
from gnn.core.outputs import class_words, write_embeddings, write_table
from gnn.data.datasets import load_graph
from gnn.task import Task


class CommunityTask(Task):
    """Groups of nodes with many edges inside and few between, found by DMoN (dmon.py)."""

    def __init__(self, config: Config, device: torch.device) -> None:
        super().__init__(config, device)
        self.whole = load_graph(config)  # on the CPU, for the methods in numpy
        self.graph = self.whole.to(device)
        self.structure = self.graph.structure()
        self.found: dict[str, NDArray[np.int64]] = {}  # labels by other methods, once they have been asked for
        self.num_communities = config.community.num_communities or self.whole.num_classes
        require(
            self.num_communities >= 2,
            "community.num_communities",
            f"must be at least 2: {self.whole.name} has no classes to count",
        )
        require(
            self.num_communities <= self.whole.num_nodes,
            "community.num_communities",
            f"must be at most {self.whole.num_nodes} nodes",
        )
        if not self.whole.num_edges:
            raise ProjectError(f"{self.whole.name}: no edges, so there is nothing to group by")
        if not labels_tell_something(self.whole):
            self.remarks.append("nmi and ari are left out: no two classes are known to compare the communities with")

    def build(self, trial: int) -> nn.Module:
        """A network for this graph."""
        return DMoN(self.config.model, self.config.community, self.graph.num_features, self.num_communities).to(
            self.device
        )

    def loss(self, net: nn.Module, step: int) -> Tensor:
        """Minus modularity plus the penalty on collapse, over the whole graph."""
        return dmon_loss(net(self.graph.features, self.structure), self.structure, self.config.community.collapse)

    def validate(self, model: nn.Module) -> dict[str, float]:
        """The objective without dropout, and the modularity of the communities as they would be reported, which
        chooses the weights.
        """
        assignment = model(self.graph.features, self.structure)
        objective = dmon_loss(assignment, self.structure, self.config.community.collapse)
        hard = F.one_hot(harden(assignment), self.num_communities).to(assignment.dtype)
        modularity = soft_modularity(hard, self.structure).item()
        return {"criterion": -modularity, "val_loss": objective.item(), "val_modularity": modularity}

    def test(self, model: nn.Module) -> dict[str, float]:
        """Quality of the communities, and agreement with the labels where there are some."""
        return measure(self.whole, self.predict(model))

    def predict(self, model: nn.Module) -> NDArray[np.int64]:
        """The community of each node, int64 (N,)."""
        return harden(model(self.graph.features, self.structure)).cpu().numpy()

    def tables(self, model: nn.Module) -> dict[str, float]:
        """The same figures for Louvain, Leiden, and spectral clustering into k groups."""
        self.found = self.others()
        return {
            f"{name}_{method}": value
            for method, labels in self.found.items()
            for name, value in measure(self.whole, labels).items()
        }

    def write_outputs(self, model: nn.Module, folder: Path) -> None:
        """communities.csv: for each node its group by DMoN and by the methods of the table; and embeddings.npz."""
        columns = {"node": self.whole.names(), "dmon": self.predict(model), **self.found}
        if self.whole.labels is not None:
            columns["label"] = class_words(self.whole.labels.numpy(), self.whole.class_names)
        write_table(folder / "communities.csv", columns)
        hidden = model.hidden(self.graph.features, self.structure)
        write_embeddings(folder / "embeddings.npz", self.whole, hidden)

    def others(self) -> dict[str, NDArray[np.int64]]:
        """Labels int64 (N,) by method."""
        community, seed = self.config.community, self.config.seed
        indptr, indices = self.whole.indptr.numpy(), self.whole.indices.numpy()
        words = {"resolution": community.resolution, "seed": seed, "restarts": community.restarts}
        return {
            "louvain": louvain(indptr, indices, **words).labels,
            "leiden": leiden(indptr, indices, **words).labels,
            "spectral": spectral_communities(indptr, indices, self.num_communities, seed),
        }

    def figures(self, model: nn.Module, folder: Path) -> None:
        """The graph with its communities coloured, and communities against classes."""
        from gnn.community import pictures

        labels = self.predict(model)
        hidden = model.hidden(self.graph.features, self.structure).cpu().numpy()
        found = metrics.modularity(self.whole.indptr.numpy(), self.whole.indices.numpy(), labels)
        title = f"{self.whole.name}: {metrics.num_communities(labels)} communities, modularity {found:.3f}"
        pictures.draw_communities(folder / "communities.png", self.whole, hidden, labels, title)
        if self.whole.labels is not None:
            pictures.draw_against_classes(
                folder / "communities_classes.png", labels, self.whole.labels.numpy(), self.whole.name
            )

    def describe(self) -> list[str]:
        """Sizes."""
        g = self.whole
        return [
            f"{g.name}: {g.num_nodes:,} nodes, {g.num_edges:,} edges, {g.num_features:,} features "
            f"({type(g.features).__name__})",
            f"at most {self.num_communities} communities; labels are not used in training",
            *g.notes,
        ]


def measure(graph: Graph, labels: NDArray[np.int64]) -> dict[str, float]:
    """Modularity, conductance and number of communities; with labels also NMI and ARI over the nodes whose class is
    known.
    """
    indptr, indices = graph.indptr.numpy(), graph.indices.numpy()
    result = {
        "modularity": metrics.modularity(indptr, indices, labels),
        "conductance": metrics.conductance(indptr, indices, labels),
        "num_communities": float(metrics.num_communities(labels)),
    }
    if labels_tell_something(graph):
        classes = graph.labels.numpy()
        known = classes >= 0
        result["nmi"] = metrics.nmi(labels[known], classes[known])
        result["ari"] = metrics.ari(labels[known], classes[known])
    return result


def labels_tell_something(graph: Graph) -> bool:
    """Whether communities can be compared with the classes: with none, or with one class for all, agreement is not
    defined.
    """
    return graph.labels is not None and len(graph.labels[graph.labels >= 0].unique()) >= 2
