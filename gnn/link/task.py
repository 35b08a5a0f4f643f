"""Link prediction: which pairs of nodes are linked, learned from a part of the edges and asked about the rest.

Legend: N nodes, M undirected training edges, P positives, K negatives a positive, D numbers of an embedding.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property, partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import scipy.sparse as sp
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.config import ConfigError, require
from common.errors import ProjectError
from common.runtime import indexed_seed, mix_seed
from gnn.config import Config, LinkConfig
from gnn.core.graph import Graph
from gnn.core.outputs import write_embeddings, write_table
from gnn.core.sparse import SparseFeatures
from gnn.data.datasets import load_graph
from gnn.link.heuristics import Heuristics
from gnn.link.metrics import auc, average_precision, pair_metrics
from gnn.link.model import LinkModel, TrainingEdges, reconstruction_loss
from gnn.link.negatives import NegativeSampler, Strangers, corrupt_hard, corrupt_uniformly
from gnn.link.splits import split_edges
from gnn.task import Task

SPLIT_STREAM, NEGATIVE_STREAM = 7_000_013, 7_000_019  # keep these generators apart from that of training
HARD = ("resource_allocation", "ppr", "features")  # what ranks hard negatives, as in HeaRT for graphs of this size
HITS = (1, 10, 50)
PAIRS_AT_A_TIME = 2**16  # scored at once in evaluation


class TestPairs(NamedTuple):
    """What the test part is asked, int64 node ids."""

    positive: Tensor  # (2, P)
    uniform: Tensor  # (2, P) uniform pairs without a link: the usual AUC and AP
    easy: Tensor  # (2, P, K) one end of a positive, and a uniform stranger to it
    hard: Tensor  # (2, P, K) one end of a positive, and the stranger that heuristics find most likely


class LinkTrial:
    """One trial's division of the edges, and what is asked of each part: made anew for each trial.

    Attributes:
        split: which edges are for what.
        train_edges: what messages pass along.
        negatives: all that training may know of what is not a link.
        val_positive, val_negative: pairs int64 (2, P) on the device.
    """

    def __init__(self, graph: Graph, link: LinkConfig, seed: int, device: torch.device) -> None:
        self.graph = graph
        self.link = link
        self.seed = seed
        self.split = split_edges(
            graph.edges(), graph.num_nodes, link.val_share, link.test_share, mix_seed(seed, SPLIT_STREAM)
        )
        for part, pairs in (("val", self.split.val), ("test", self.split.test)):
            require(pairs.shape[1], f"link.{part}_share", f"leaves no edge of {graph.num_edges} in that part; raise it")
        self.train_edges = TrainingEdges(self.split.train, graph.num_nodes, device)
        self.negatives = NegativeSampler(self.split.train, graph.num_nodes)
        self.val_positive = self.split.val.to(device)
        self.val_negative = self.evaluation_negatives(self.split.val.shape[1], 0).to(device)

    def evaluation_negatives(self, count: int, stream: int) -> Tensor:
        """Uniform pairs without an edge of any part, int64 (2, count), the same each time."""
        rng = torch.Generator().manual_seed(indexed_seed(self.seed, NEGATIVE_STREAM, stream))
        return NegativeSampler(self.split.all, self.graph.num_nodes).draw_distinct(count, rng)

    def check(self) -> None:
        """`ProjectError` where a part of the edges cannot be asked about: too few pairs or nodes that are not
        linked.
        """
        test = self.split.test
        try:
            self.evaluation_negatives(test.shape[1], 1)
            Strangers(self.split.all, self.graph.num_nodes).require(test.numpy(), self.link.num_negatives // 2)
        except ValueError as error:
            raise ProjectError(f"{self.graph.name}: {error}") from None

    @cached_property
    def heuristics(self) -> Heuristics:
        """Scores without learning, on this trial's training edges."""
        return Heuristics(self.split.train, self.graph.num_nodes, features_as_scipy(self.graph.features))

    @cached_property
    def test_pairs(self) -> TestPairs:
        """The test edges and their negatives, made when they are first needed: training never asks for them."""
        test = self.split.test
        edges = self.split.all
        num_nodes = self.graph.num_nodes
        seed = mix_seed(self.seed, NEGATIVE_STREAM, 2)
        rows = [self.heuristics.rows(name) for name in HARD if name in self.heuristics.names]
        return TestPairs(
            positive=test,
            uniform=self.evaluation_negatives(test.shape[1], 1),
            easy=corrupt_uniformly(test, edges, num_nodes, self.link.num_negatives, seed),
            hard=corrupt_hard(test, edges, num_nodes, self.link.num_negatives, seed, rows),
        )

    def measure(self, scorer: Callable[[Tensor], Tensor]) -> dict[str, float]:
        """All metrics of a function from pairs int64 (2, S) to scores (S,), which is called once: some scorers prepare
        whole rows.
        """
        pairs = self.test_pairs
        flat = [kind.flatten(1) for kind in pairs]  # of (2, number of pairs)
        scores = scorer(torch.cat(flat, dim=1)).split([kind.shape[1] for kind in flat])
        positive, uniform, easy, hard = scores
        easy = easy.view(pairs.easy.shape[1:])  # (P, K)
        hard = hard.view(pairs.hard.shape[1:])  # (P, K)
        against_easy = pair_metrics(positive, uniform, easy, HITS)
        against_hard = pair_metrics(positive, hard, hard, HITS, "_hard")
        return {**against_easy, **against_hard}


class LinkTask(Task):
    """Autoencoders on a graph from which edges were taken. Each trial draws its own split.

    Encoders never see validation or test edges, neither in training nor in evaluation: a test pair is scored with the
    embeddings of the training graph.
    """

    def __init__(self, config: Config, device: torch.device) -> None:
        super().__init__(config, device)
        self.graph = load_graph(config)
        if self.graph.num_edges < 20:
            raise ProjectError(f"{self.graph.name}: {self.graph.num_edges} edges are too few to hold out some of them")
        require(config.model.layer != "grand", "model.layer", "grand is for task=node")
        self.features = self.graph.to(device).features
        self.num_nodes = self.graph.num_nodes
        for trial in range(self.num_trials):  # to find out now whether each can be trained and evaluated
            self.trial = self.divide(trial)
            self.trial.check()
        self.trial = self.divide(0)

    def divide(self, trial: int) -> LinkTrial:
        """The edges as a trial sees them. `ProjectError` for a graph in which nearly all pairs are linked."""
        try:
            return LinkTrial(self.graph, self.config.link, self.seed_of(trial), self.device)
        except ConfigError:
            raise
        except ValueError as error:
            raise ProjectError(f"{self.graph.name}: {error}") from None

    def build(self, trial: int) -> nn.Module:
        """A fresh model, and the trial's split."""
        self.trial = self.divide(trial)
        return LinkModel(self.config.link, self.config.model, self.graph.num_features).to(self.device)

    def loss(self, net: nn.Module, step: int) -> Tensor:
        """Cross-entropy of positives and as many fresh uniform negatives, and the method's own term.

        gae and vgae reconstruct the edges that they see; maskgae and supervised score edges that the encoder does not
        see in this step. The cost is that of encoding the whole graph, so nothing is sharded: several processes all
        compute the same step.
        """
        link = self.config.link
        edges = self.trial.train_edges
        if link.method in ("maskgae", "supervised"):
            hidden = self.hide()
            structure = edges.without(hidden)
            positive = edges.pairs[:, hidden]
        else:
            hidden = None
            structure = edges.whole
            positive = edges.pairs
        negative = self.trial.negatives.draw(positive.shape[1]).to(self.device)
        out = net(self.features, structure, torch.cat([positive, negative], 1))
        loss = reconstruction_loss(out.logits, positive.shape[1])
        if out.kl is not None:
            loss = loss + link.kl_weight * out.kl / self.num_nodes
        if out.degree is not None:
            loss = loss + link.degree_weight * F.mse_loss(out.degree, edges.degrees(hidden))
        return loss

    def hide(self) -> Tensor:
        """The pairs that this step's encoder must not see, bool (M,); at least one."""
        link = self.config.link
        edges = self.trial.train_edges
        if link.method == "supervised":
            return edges.mask_batch(self.config.train.batch_size)
        if link.mask == "edge":
            hidden = edges.mask_edges(link.mask_share)
        else:
            hidden = edges.mask_paths(link.mask_share, link.walk_length)
        return hidden if bool(hidden.any()) else edges.mask_batch(1)

    def validate(self, model: nn.Module) -> dict[str, float]:
        """AUC and AP on the validation edges; the weights with the largest sum of both are kept."""
        z = self.embed(model)
        positive = model.score(z, self.trial.val_positive)
        negative = model.score(z, self.trial.val_negative)
        area = auc(positive, negative)
        precision = average_precision(positive, negative)
        return {"criterion": 1 - (area + precision) / 2, "val_auc": area, "val_ap": precision}

    def test(self, model: nn.Module) -> dict[str, float]:
        """AUC, AP, MRR and Hits@K of the test edges against uniform and against hard negatives; AUC and AP of the
        validation edges.
        """
        z = self.embed(model)
        found = self.trial.measure(lambda pairs: self.score(model, z, pairs))
        validation = self.validate(model)
        return {**found, "val_auc": validation["val_auc"], "val_ap": validation["val_ap"]}

    def tables(self, model: nn.Module) -> dict[str, float]:
        """AUC, AP and MRR of each heuristic, which sees the training edges only."""
        known = self.trial.heuristics
        found = {}
        for name in known.names:
            for metric, value in self.trial.measure(partial(known.score, name)).items():
                if not metric.startswith("hits"):
                    found[f"{metric}_{name}"] = value
        return found

    def write_outputs(self, model: nn.Module, folder: Path) -> None:
        """predictions.csv, a line for each hidden link and for each uniform pair without one; and embeddings.npz."""
        z = self.embed(model)
        asked = self.trial.test_pairs
        pairs = torch.cat([asked.positive, asked.uniform], dim=1)  # (2, 2P)
        score = self.score(model, z, pairs)
        names = self.graph.names()
        source, target = names[pairs.numpy()]
        linked = np.repeat([1, 0], asked.positive.shape[1])
        columns = {"source": source, "target": target, "linked": linked, "probability": score.sigmoid().numpy()}
        write_table(folder / "predictions.csv", columns)
        write_embeddings(folder / "embeddings.npz", self.graph, z)

    def figures(self, model: nn.Module, folder: Path) -> None:
        """Embeddings coloured by class, scores of links and of both kinds of negatives, ROC and precision-recall
        curves.
        """
        from gnn.core import pictures
        from gnn.link import pictures as link_pictures

        z = self.embed(model)
        pairs = self.trial.test_pairs
        score = {
            "positive": self.score(model, z, pairs.positive),
            "uniform": self.score(model, z, pairs.uniform),
            "hard": self.score(model, z, pairs.hard),
        }
        title = f"{self.config.link.method} on {self.graph.name}"
        link_pictures.draw_scores(folder / "scores.png", score, title)
        link_pictures.draw_thresholds(folder / "thresholds.png", score, title)
        if self.graph.labels is not None:
            pictures.draw_embedding(folder / "embedding.png", z, self.graph.labels, f"embeddings of {title}, t-SNE")

    def describe(self) -> list[str]:
        """Sizes."""
        g = self.graph
        s = self.trial.split
        return [
            f"{g.name}: {g.num_nodes:,} nodes, {g.num_edges:,} edges, {g.num_features:,} features "
            f"({type(g.features).__name__})",
            f"edges of a trial: {s.train.shape[1]:,} training, {s.val.shape[1]:,} validation, {s.test.shape[1]:,} "
            "test; "
            f"{self.config.link.num_negatives} easy and as many hard negatives for each test edge",
            *g.notes,
        ]

    def embed(self, model: nn.Module) -> Tensor:
        """Embeddings (N, D) of the graph of this trial's training edges."""
        return model.embed(self.features, self.trial.train_edges.whole)

    def score(self, model: nn.Module, z: Tensor, pairs: Tensor) -> Tensor:
        """Logits of pairs (2, ...) on the CPU, some at a time, in the shape of the pairs."""
        parts = pairs.flatten(1).split(PAIRS_AT_A_TIME, dim=1)
        return torch.cat([model.score(z, part.to(self.device)).cpu() for part in parts]).view(pairs.shape[1:])


def features_as_scipy(features: Tensor | SparseFeatures | None) -> sp.csr_array | None:
    """Features (N, F) for the heuristics, which work in scipy."""
    if isinstance(features, SparseFeatures):
        pattern = features.pattern
        return sp.csr_array(
            (features.values.numpy(), pattern.indices.numpy(), pattern.indptr.numpy()), shape=features.shape
        )
    return None if features is None else sp.csr_array(features.numpy())
