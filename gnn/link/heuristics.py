"""Link prediction without learning: how likely a pair is linked, from the training graph alone.

With Gamma(u) the neighbours of u, d(u) their number, A the adjacency of the training edges:

    common_neighbours         |Gamma(u) & Gamma(v)|
    adamic_adar               sum over common neighbours w of 1 / log d(w)        (Adamic & Adar 2003)
    resource_allocation       sum over common neighbours w of 1 / d(w)            (Zhou, Lu, Zhang 2009)
    preferential_attachment   d(u) d(v)                                           (Barabasi & Albert 1999)
    katz                      sum over l = 1 .. 6 of beta^l (A^l)_uv              (Katz 1953, cut off; beta 0.005)
    ppr                       pi_u(v) + pi_v(u), pi_u the stationary distribution of a walk along edges that
                              returns to u with probability 0.15 a step           (rooted PageRank, Liben-Nowell &
                                                                                  Kleinberg 2003)
    features                  cosine of the two feature vectors; this one sees no graph at all

A model that does not beat these has learned nothing about links, so each table of results shows them.

Legend: N nodes, M edges, F features, B sources, S pairs.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property

import numpy as np
import scipy.sparse as sp
import torch
from torch import Tensor

KATZ_BETA, KATZ_LENGTH = 0.005, 6
PPR_RETURN, PPR_ITERATIONS = 0.15, 40
ROW_ENTRIES = 2**18  # numbers in one block of dense rows: 2 MB, which stay in the cache


class Heuristics:
    """Scores of pairs of nodes on one set of edges.

    Args: canonical `edges` int64 (2, M), training edges only; `features`, any scipy matrix or array (N, F), or None.
    """

    def __init__(self, edges: Tensor, num_nodes: int, features: sp.spmatrix | np.ndarray | None = None) -> None:
        u, v = edges.numpy()
        ones = np.ones(2 * len(u))
        self.num_nodes = num_nodes
        self.adjacency = sp.csr_array(
            (ones, (np.concatenate([u, v]), np.concatenate([v, u]))), shape=(num_nodes, num_nodes)
        )
        self.degree = self.adjacency.sum(1)  # (N,)
        self._features = features

    @property
    def names(self) -> tuple[str, ...]:
        """All heuristics that this graph offers; `features` needs features."""
        known = ("common_neighbours", "adamic_adar", "resource_allocation", "preferential_attachment", "katz", "ppr")
        if self._features is None:
            return known
        return (*known, "features")

    def score(self, name: str, pairs: Tensor) -> Tensor:
        """Scores of `pairs`, int64 (2, ...) in any order of the ends, as float64 (...). ValueError for an unknown
        name.
        """
        self._check(name)
        u, v = pairs.reshape(2, -1).numpy()
        if name == "preferential_attachment":
            found = self.degree[u] * self.degree[v]
        elif name in ("katz", "ppr"):
            found = self._from_rows(name, u, v)
        elif name == "features":
            found = _row_products(self.unit_features, self.unit_features, u, v)
        else:
            found = _row_products(self.adjacency, self.adjacency * self._middle(name), u, v)
        return torch.from_numpy(found).view(pairs.shape[1:])

    def rows(self, name: str) -> Callable[[np.ndarray], np.ndarray]:
        """A function from sources int64 (B,) to their scores with all nodes, float64 (B, N); for `ppr` it is pi_u(v)
        alone.

        ValueError for a name without such a function.
        """
        self._check(name)
        if name == "ppr":
            return self._ppr
        if name == "katz":
            return self._katz
        if name == "features":
            return lambda nodes: _dense(self.unit_features[nodes] @ self.unit_features.T)
        if name == "preferential_attachment":
            return lambda nodes: self.degree[nodes, None] * self.degree
        weighted = self.adjacency * self._middle(name)  # (N, N), column w scaled by what a common neighbour w is worth
        return lambda nodes: _dense(weighted[nodes] @ self.adjacency)

    @cached_property
    def unit_features(self) -> sp.csr_array:
        """Feature rows of length 1, (N, F); a row of zeros stays one."""
        features = sp.csr_array(self._features, dtype=np.float64)
        length = np.sqrt(features.multiply(features).sum(1))
        return sp.csr_array(sp.diags_array(_inverse(length)) @ features)

    def _middle(self, name: str) -> np.ndarray:
        """What a common neighbour is worth, (N,). It has two neighbours or more, so that log d > 0; others get 0 and
        are never used.
        """
        if name == "common_neighbours":
            return np.ones(self.num_nodes)
        return _inverse(np.log(np.maximum(self.degree, 1)) if name == "adamic_adar" else self.degree)

    def _from_rows(self, name: str, u: np.ndarray, v: np.ndarray) -> np.ndarray:
        """(S,) scores of a heuristic that is computed by source, with a bounded number of rows in memory at a time."""
        rows = self.rows(name)
        found = np.zeros(len(u))
        ends = [(u, v), (v, u)] if name == "ppr" else [(u, v)]  # Katz is symmetric
        nodes = np.unique(np.concatenate([a for a, _ in ends])) if len(u) else np.empty(0, dtype=np.int64)
        size = max(1, ROW_ENTRIES // self.num_nodes)
        for start in range(0, len(nodes), size):
            sources = nodes[start : start + size]
            block = rows(sources)  # (B, N)
            for a, b in ends:
                place = np.searchsorted(sources, a)
                inside = np.minimum(place, len(sources) - 1)
                here = np.flatnonzero(sources[inside] == a)  # the pairs whose first end is among the sources
                found[here] += block[place[here], b[here]]
        return found

    def _katz(self, nodes: np.ndarray) -> np.ndarray:
        # (N, B), transposed because a sparse matrix stands on the left
        walks = _dense(self.adjacency[nodes]).T * KATZ_BETA
        total = walks.copy()
        for _ in range(KATZ_LENGTH - 1):
            walks = KATZ_BETA * (self.adjacency @ walks)
            total += walks
        return total.T

    def _ppr(self, nodes: np.ndarray) -> np.ndarray:
        """pi = c e_u + (1 - c) P^T pi for each u of `nodes`, solved by Chebyshev's semi-iteration (Golub & Varga 1961).

        P^T has the eigenvalues of the symmetric D^-1/2 A D^-1/2, which lie in [-1, 1]. Knowing that, each iteration
        divides the error by 1.8, where plain power iteration divides it by 1 / (1 - c) = 1.18: 40 iterations leave
        1e-10, and 9
        decimals are returned. Rows sum to 1; a walk at a node without edges stays there.
        """
        # (N, N): column u spreads over the neighbours of u
        walk = self.adjacency * ((1 - PPR_RETURN) * _inverse(self.degree))
        start = np.zeros((self.num_nodes, len(nodes)))  # (N, B)
        start[nodes, np.arange(len(nodes))] = np.where(self.degree[nodes] > 0, PPR_RETURN, 1.0)
        walk = sp.csr_array(walk)
        radius = 1 - PPR_RETURN
        before = start
        pi = start + walk @ start  # one plain iteration first
        omega = 2.0
        for _ in range(PPR_ITERATIONS):
            omega = 1 / (1 - radius**2 * omega / 4)
            new = walk @ pi
            new += start
            new -= before
            new *= omega
            new += before
            before = pi
            pi = new
        return pi.T.round(9)  # nodes in equal positions tie, whatever the order of the sums

    def _check(self, name: str) -> None:
        if name not in self.names:
            raise ValueError(f"unknown heuristic {name!r}: choose one of {', '.join(self.names)}")


def _row_products(a: sp.csr_array, b: sp.csr_array, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Inner products of rows u of `a` and rows v of `b`, (S,), some at a time."""
    a = sp.csr_array(a)
    b = sp.csr_array(b)
    found = np.zeros(len(u))
    for start in range(0, len(u), 2**16):
        some = slice(start, start + 2**16)
        found[some] = a[u[some]].multiply(b[v[some]]).sum(1)
    return found


def _inverse(values: np.ndarray) -> np.ndarray:
    """1 / values where they are not 0, else 0."""
    return np.divide(1.0, values, out=np.zeros(len(values)), where=values > 0)


def _dense(matrix: sp.sparray | np.ndarray) -> np.ndarray:
    return matrix.toarray() if sp.issparse(matrix) else np.asarray(matrix)
