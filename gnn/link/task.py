"""Link prediction: which pairs of nodes are linked, learned from a part of the edges and asked about the rest.

Legend: N nodes, M undirected training edges, P positives, K negatives a positive, D numbers of an embedding.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import scipy.sparse as sp
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.config import require
from common.errors import ProjectError
from common.runtime import mix_seed
from gnn.config import Config
from gnn.core.sparse import SparseFeatures
from gnn.data.datasets import load_graph
from gnn.link.heuristics import Heuristics
from gnn.link.metrics import auc, average_precision, pair_metrics
from gnn.link.model import LinkModel, TrainingEdges, reconstruction_loss
from gnn.link.negatives import NegativeSampler, corrupt_hard, corrupt_uniformly
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
        self.edges, self.num_nodes = self.graph.edges(), self.graph.num_nodes
        self.prepare(0)  # to find out now whether it can be split

    def prepare(self, trial: int) -> None:
        """The trial's split, its training structure, and its validation negatives."""
        self.trial, link = trial, self.config.link
        self.split = split_edges(
            self.edges, self.num_nodes, link.val_share, link.test_share, mix_seed(self.seed_of(trial), SPLIT_STREAM)
        )
        for part, pairs in (("val", self.split.val), ("test", self.split.test)):
            require(
                pairs.shape[1] > 0,
                f"link.{part}_share",
                f"leaves no edge of {self.graph.num_edges} in that part; raise it",
            )
        self.train_edges = TrainingEdges(self.split.train, self.num_nodes, self.device)
        # all that training may know of what is not a link
        self.negatives = NegativeSampler(self.split.train, self.num_nodes)
        self.val_negative = self.evaluation_negatives(self.split.val.shape[1], 0).to(self.device)
        self.val_positive = self.split.val.to(self.device)

    def evaluation_negatives(self, count: int, stream: int) -> Tensor:
        """Uniform pairs without an edge of any part, int64 (2, count), the same each time."""
        rng = torch.Generator().manual_seed(mix_seed(self.seed_of(self.trial), NEGATIVE_STREAM, stream))
        return NegativeSampler(self.split.all, self.num_nodes).draw_distinct(count, rng)

    def build(self, trial: int) -> nn.Module:
        """A fresh model, and the trial's split."""
        self.prepare(trial)
        self.__dict__.pop("test_pairs", None)
        self.__dict__.pop("heuristics", None)
        return LinkModel(self.config.link, self.config.model, self.graph.num_features).to(self.device)

    def loss(self, net: nn.Module, step: int) -> Tensor:
        """Cross-entropy of positives and as many fresh uniform negatives, and the method's own term.

        gae and vgae reconstruct the edges that they see; maskgae and supervised score edges that the encoder does not
        see in this step. The cost is that of encoding the whole graph, so nothing is sharded: several processes all
        compute the same step.
        """
        link, edges = self.config.link, self.train_edges
        hidden, structure, positive = None, edges.whole, edges.pairs
        if link.method in ("maskgae", "supervised"):
            hidden = self.hide()
            structure, positive = edges.without(hidden), edges.pairs[:, hidden]
        negative = self.negatives.draw(positive.shape[1]).to(self.device)
        out = net(self.features, structure, torch.cat([positive, negative], 1))
        loss = reconstruction_loss(out.logits, positive.shape[1])
        if out.kl is not None:
            loss = loss + link.kl_weight * out.kl / self.num_nodes
        if out.degree is not None:
            loss = loss + link.degree_weight * F.mse_loss(out.degree, edges.degrees(hidden))
        return loss

    def hide(self) -> Tensor:
        """The pairs that this step's encoder must not see, bool (M,); at least one."""
        link, edges = self.config.link, self.train_edges
        if link.method == "supervised":
            return edges.mask_batch(self.config.train.batch_size)
        hidden = (
            edges.mask_edges(link.mask_share)
            if link.mask == "edge"
            else edges.mask_paths(link.mask_share, link.walk_length)
        )
        return hidden if bool(hidden.any()) else edges.mask_batch(1)

    def validate(self, model: nn.Module) -> dict[str, float]:
        """AUC and AP on the validation edges; the weights with the largest sum of both are kept."""
        z = model.embed(self.features, self.train_edges.whole)
        positive, negative = model.score(z, self.val_positive), model.score(z, self.val_negative)
        found = {"val_auc": auc(positive, negative), "val_ap": average_precision(positive, negative)}
        return {"criterion": 1 - (found["val_auc"] + found["val_ap"]) / 2, **found}

    def test(self, model: nn.Module) -> dict[str, float]:
        """AUC, AP, MRR and Hits@K of the test edges against uniform and against hard negatives; AUC and AP of the
        validation edges.
        """
        z = model.embed(self.features, self.train_edges.whole)
        validation = self.validate(model)
        return {
            **self.metrics(lambda pairs: self.score(model, z, pairs)),
            **{name: validation[name] for name in ("val_auc", "val_ap")},
        }

    def tables(self, model: nn.Module) -> dict[str, float]:
        """AUC, AP and MRR of each heuristic, which sees the training edges only."""
        found = {}
        for name in self.heuristics.names:
            metrics = self.metrics(lambda pairs, name=name: self.heuristics.score(name, pairs))
            found |= {f"{metric}_{name}": value for metric, value in metrics.items() if not metric.startswith("hits")}
        return found

    def figures(self, model: nn.Module, folder: Path) -> None:
        """Embeddings coloured by class, scores of links and of both kinds of negatives, ROC and precision-recall
        curves.
        """
        from gnn.core import pictures
        from gnn.link import pictures as link_pictures

        z, pairs = model.embed(self.features, self.train_edges.whole), self.test_pairs
        score = {name: self.score(model, z, getattr(pairs, name)) for name in ("positive", "uniform", "hard")}
        title = f"{self.config.link.method} on {self.graph.name}"
        link_pictures.draw_scores(folder / "scores.png", score, title)
        link_pictures.draw_thresholds(folder / "thresholds.png", score, title)
        if self.graph.labels is not None:
            pictures.draw_embedding(folder / "embedding.png", z, self.graph.labels, f"embeddings of {title}, t-SNE")

    def describe(self) -> list[str]:
        """Sizes."""
        g, s = self.graph, self.split
        return [
            f"{g.name}: {g.num_nodes:,} nodes, {g.num_edges:,} edges, {g.num_features:,} features "
            f"({type(g.features).__name__})",
            f"edges of a trial: {s.train.shape[1]:,} training, {s.val.shape[1]:,} validation, {s.test.shape[1]:,} "
            "test; "
            f"{self.config.link.num_negatives} easy and as many hard negatives for each test edge",
        ]

    # Evaluation

    @cached_property
    def heuristics(self) -> Heuristics:
        """Scores without learning, on this trial's training edges."""
        return Heuristics(self.split.train, self.num_nodes, features_as_scipy(self.graph.features))

    @cached_property
    def test_pairs(self) -> TestPairs:
        """The test edges of this trial and their negatives, made when they are first needed: training never asks for
        them.
        """
        split, link = self.split, self.config.link
        seed = mix_seed(self.seed_of(self.trial), NEGATIVE_STREAM, 2)
        known = self.heuristics
        rows = [known.rows(name) for name in HARD if name in known.names]
        return TestPairs(
            split.test,
            self.evaluation_negatives(split.test.shape[1], 1),
            corrupt_uniformly(split.test, split.all, self.num_nodes, link.num_negatives, seed),
            corrupt_hard(split.test, split.all, self.num_nodes, link.num_negatives, seed, rows),
        )

    def metrics(self, scorer: Callable[[Tensor], Tensor]) -> dict[str, float]:
        """All metrics of a function from pairs int64 (2, S) to scores (S,)."""
        pairs = self.test_pairs
        sizes = [part[0].numel() for part in pairs]
        # (sum of sizes,): one call, since some scorers work by rows
        flat = scorer(torch.cat([part.flatten(1) for part in pairs], 1))
        positive, uniform, easy, hard = (s.view(part.shape[1:]) for s, part in zip(flat.split(sizes), pairs))
        return pair_metrics(positive, uniform, easy, HITS) | pair_metrics(positive, hard, hard, HITS, "_hard")

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
