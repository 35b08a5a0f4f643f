"""How well a planted network's communities can be known at all: accuracies to hold a trained network against.

Legend: N nodes, n nodes in question, C communities, F features.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from gnn.config import SyntheticConfig
from gnn.core.compiled import compiled
from gnn.core.graph import Graph
from gnn.data.synthetic import centres, plant_social


def feature_scores(x: NDArray, points: NDArray, shares: NDArray) -> NDArray:
    """float64 (n, C): log posterior, up to a constant, of each community from a node's own features (n, F) alone.

    Features are Gaussian around the centres (C, F) with unit variance, so their argmax is the Bayes classifier: no
    method that sees a node's own features only is more accurate in expectation.
    """
    return (
        x.astype(np.float64) @ points.T.astype(np.float64)
        - 0.5 * np.square(points).sum(1)
        + np.log(np.maximum(shares, 1e-300))
    )


@compiled(nogil=True)
def neighbour_counts(
    nodes: NDArray, indptr: NDArray, indices: NDArray, communities: NDArray, num_communities: int
) -> NDArray:
    """int64 (n, C): how many neighbours of each node lie in each community."""
    counts = np.zeros((len(nodes), num_communities), np.int64)
    for i in range(len(nodes)):
        for e in range(indptr[nodes[i]], indptr[nodes[i] + 1]):
            counts[i, communities[indices[e]]] += 1
    return counts


def ceilings(graph: Graph, settings: SyntheticConfig) -> dict[str, float]:
    """Test accuracies that bound what can be learned on a DC-SBM, and the share of the largest class.

    `_features`: Bayes classifier of a node's own features. `_ceiling`: Bayes classifier of a node's features and edges
    when the communities of all other nodes are given. In a DC-SBM with omega constant outside the diagonal, the
    log-likelihood of community r is n_r log(omega_rr / omega_rs) plus a constant, n_r counting the neighbours in r
    (Karrer & Newman 2011, eq. 8): the expected degree of a node does not depend on its community here. A trained
    network must guess the neighbours' communities, too, and can only do worse; with few neighbours a node, much worse.
    """
    labels, test = graph.labels.numpy(), graph.test.numpy()
    majority = np.bincount(labels[graph.train.numpy()], minlength=graph.num_classes).argmax()
    found = {"test_accuracy_majority": float((labels[test] == majority).mean())}
    if settings.generator != "dcsbm":
        return found
    planted = plant_social(settings)
    points = centres(settings.communities, settings.features, settings.signal, settings.seed)
    shares = np.bincount(planted.communities, minlength=settings.communities) / settings.nodes
    own = feature_scores(graph.features[graph.test].numpy(), points, shares)  # (n, C)
    counts = neighbour_counts(
        test, graph.indptr.numpy(), graph.indices.numpy(), planted.communities, settings.communities
    )
    both = own + counts * planted.edge_evidence
    return found | {
        "test_accuracy_features": float((own.argmax(1) == labels[test]).mean()),
        "test_accuracy_ceiling": float((both.argmax(1) == labels[test]).mean()),
    }
