"""Node classification with minibatches: each step sees sampled neighbourhoods or a few clusters, never the whole graph.

Legend: N nodes, B seed nodes a step over all processes, n nodes of a batch, F features, D width, K classes.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Generic, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.config import require
from common.errors import ProjectError
from common.runtime import mix_seed
from gnn.config import Config
from gnn.core.graph import Graph
from gnn.core.outputs import write_predictions
from gnn.core.scores import accuracy, macro_f1
from gnn.core.sparse import SparseFeatures, Structure
from gnn.data.ceilings import ceilings
from gnn.data.datasets import load_graph, random_split
from gnn.model import build_model
from gnn.node.clusters import ClusterBatches
from gnn.node.neighbours import ALL, Block, NeighborSampler, edge_chunks, epoch_batch
from gnn.task import Task

BIPARTITE = ("sage", "gat", "gatv2", "gin", "mlp")  # layers that need nothing of a source but its features
# features, structure, rows with a loss, their labels
Batch = tuple[Tensor, Structure | list[Structure], Tensor, Tensor]
T = TypeVar("T")


class Ahead(Generic[T]):
    """Results of make(step), prepared up to `depth` steps ahead by one thread; the compiled sampling loops run outside
    Python's lock.

    make must be a function of the step alone: what comes out does not depend on whether, or how far, anything ran
    ahead.
    """

    def __init__(self, make: Callable[[int], T], depth: int, last: int) -> None:
        self.make = make
        self.depth = depth
        self.last = last
        self.waiting: dict[int, Future[T]] = {}
        self.thread = ThreadPoolExecutor(1, "batches") if depth else None

    def get(self, step: int) -> T:
        """The result for `step`; steps may be asked for in any order."""
        if self.thread is None:
            return self.make(step)
        wanted = range(step, max(step, min(step + self.depth, self.last)) + 1)
        for old in [s for s in self.waiting if s not in wanted]:
            self.waiting.pop(old).cancel()
        for s in wanted:
            if s not in self.waiting:
                self.waiting[s] = self.thread.submit(self.make, s)
        return self.waiting.pop(step).result()

    def close(self) -> None:
        """End the thread."""
        if self.thread is not None:
            self.thread.shutdown(wait=True, cancel_futures=True)


class SampledNodeTask(Task):
    """A class for each node of a graph too large to pass through the network whole.

    With several processes each takes its share of the B seed nodes. All processes keep the same neighbours of a node in
    a step, so the mean of their gradients is that of one process with all B. A batch of clusters cannot be divided
    without losing edges: every process computes the same one.
    """

    def __init__(self, config: Config, device: torch.device) -> None:
        super().__init__(config, device)
        sampling, model = config.sampling, config.model
        if sampling.kind == "neighbors":
            require(
                model.layer in BIPARTITE,
                "model.layer",
                f"{model.layer} needs the whole graph; sampled neighbours work with {', '.join(BIPARTITE)}",
            )
            require(
                len(sampling.fanouts) == model.layers,
                "sampling.fanouts",
                f"has {len(sampling.fanouts)} numbers for model.layers={model.layers}; give one a layer",
            )
        else:
            require(
                model.layer != "grand", "model.layer", "grand propagates over the whole graph; use sampling.kind=none"
            )
            usable = model.layer in BIPARTITE or sampling.validate == "full"
            require(usable, "sampling.validate", f"must be full for model.layer={model.layer}")
        self.whole = load_graph(config)  # stays in the CPU's memory, or on disk
        if self.whole.labels is None or self.whole.num_classes < 2:
            raise ProjectError(f"{self.whole.name}: node classification needs labels of at least two classes")
        self.random = config.data.split == "random" or not len(self.whole.train)
        self.graph = random_split(self.whole, config.data, config.seed) if self.random else self.whole
        graph = self.graph
        require(
            len(graph.val) and len(graph.test),
            "data.split",
            f"{graph.name} has no validation or test nodes; use data.split=random",
        )
        if sampling.kind == "clusters":
            require(
                sampling.clusters <= graph.num_nodes,
                "sampling.clusters",
                f"must be at most the {graph.num_nodes} nodes of {graph.name}",
            )
        self.ahead: Ahead[Batch] | None = None
        self.clusters: ClusterBatches | None = None

    def build(self, trial: int) -> nn.Module:
        """A network for this graph; the batches of the trial start anew."""
        seed = self.seed_of(trial)
        if self.random:
            self.graph = random_split(self.whole, self.config.data, seed)
        graph = self.graph
        if self.ahead is not None:
            self.ahead.close()
        self.ahead = None
        self.seed = seed
        return build_model(self.config.model, graph.num_features, graph.num_classes).to(self.device)

    def start_batches(self) -> Ahead[Batch]:
        """Everything that training needs and evaluation does not."""
        graph = self.graph
        sampling = self.config.sampling
        if sampling.kind == "neighbors":
            self.sampler = NeighborSampler(graph.indptr, graph.indices, sampling.fanouts, self.seed)
            return Ahead(self.neighbor_batch, sampling.prefetch, self.config.train.steps)
        self.clusters = self.clusters or ClusterBatches(
            graph.indptr, graph.indices, sampling.clusters, sampling.clusters_per_batch
        )
        self.clusters.seed = self.seed
        self.in_train = torch.zeros(graph.num_nodes, dtype=torch.bool)
        self.in_train[graph.train] = True
        return Ahead(self.cluster_batch, sampling.prefetch, self.config.train.steps)

    # -- batches -------------------------------------------------------------------------------------------------------

    def neighbor_batch(self, step: int) -> Batch:
        """The sampled neighbourhood of this process's share of the step's seed nodes; they are the first rows."""
        batch = epoch_batch(self.graph.train, self.config.train.batch_size, self.seed, step)
        return self.around(self.sampler, self.shard(batch), step)

    def around(self, sampler: NeighborSampler, seeds: Tensor, step: int) -> Batch:
        """The batch of these seed nodes (B,)."""
        sample = sampler.sample(seeds, step)
        structures = [as_structure(block, self.device) for block in sample.blocks]
        return self.rows(sample.nodes), structures, torch.arange(len(seeds), device=self.device), self.labels(seeds)

    def cluster_batch(self, step: int) -> Batch:
        """The subgraph of the step's clusters; the loss is that of the training nodes among them."""
        nodes, block = self.clusters.batch(step)
        known = self.in_train[nodes].nonzero().flatten()
        structure = as_structure(block, self.device, symmetric=True)
        return self.rows(nodes), structure, known.to(self.device), self.labels(nodes[known])

    def rows(self, nodes: Tensor) -> Tensor:
        """Features (n, F) of some nodes, on the device."""
        x = self.graph.features
        return (x.rows(nodes) if isinstance(x, SparseFeatures) else x.index_select(0, nodes)).to(
            self.device, torch.get_default_dtype()
        )

    def labels(self, nodes: Tensor) -> Tensor:
        """Labels (n,) of some nodes, on the device."""
        return self.graph.labels[nodes].to(self.device)

    # -- what the loop asks --------------------------------------------------------------------------------------------

    def loss(self, net: nn.Module, step: int) -> Tensor:
        """Mean cross-entropy over the seed nodes of the step, or over the training nodes in its clusters."""
        self.ahead = self.ahead or self.start_batches()
        x, structure, rows, labels = self.ahead.get(step)
        logits = net(x, structure)
        if not len(labels):  # clusters without a training node: a loss of zero that still reaches every weight
            return logits.sum() * 0
        return F.cross_entropy(logits.index_select(0, rows), labels)

    def validate(self, model: nn.Module) -> dict[str, float]:
        """Loss and accuracy on validation nodes: a fixed part with fixed sampled neighbours, or all of them with all
        neighbours.
        """
        sampling = self.config.sampling
        val = self.graph.val
        if sampling.validate == "full":
            logits, labels = infer(model, self.graph, sampling.chunk_edges, self.device)[val], self.graph.labels[val]
        else:
            chosen = epoch_batch(val, sampling.validate_nodes, 0, 1)
            fanouts = sampling.fanouts if sampling.kind == "neighbors" else [10] * self.config.model.layers
            logits = self.sampled_logits(model, chosen, fanouts)
            labels = self.graph.labels[chosen]
        loss = F.cross_entropy(logits, labels).item()
        return {"criterion": loss, "val_loss": loss, "val_accuracy": accuracy(logits, labels)}

    def sampled_logits(self, model: nn.Module, nodes: Tensor, fanouts: tuple[int, ...] | list[int]) -> Tensor:
        """(n, K) from sampled neighbourhoods that are the same at every call."""
        sampler = NeighborSampler(self.graph.indptr, self.graph.indices, fanouts, mix_seed(0, 1))
        size = self.config.train.batch_size
        parts = [model(*self.around(sampler, part, 0)[:2]) for part in nodes.split(size)]
        return torch.cat(parts).cpu()

    def test(self, model: nn.Module) -> dict[str, float]:
        """Accuracy and macro-F1 on all test nodes with all their neighbours, by layer-wise inference."""
        graph = self.graph
        logits = infer(model, graph, self.config.sampling.chunk_edges, self.device)
        labels = graph.labels[graph.test]
        return {
            "test_accuracy": accuracy(logits[graph.test], labels),
            "test_macro_f1": macro_f1(logits[graph.test], labels),
            "val_accuracy": accuracy(logits[graph.val], graph.labels[graph.val]),
        }

    def write_outputs(self, model: nn.Module, folder: Path) -> None:
        """predictions.csv."""
        logits = infer(model, self.graph, self.config.sampling.chunk_edges, self.device)
        write_predictions(folder / "predictions.csv", self.graph, logits)

    def tables(self, model: nn.Module) -> dict[str, float]:
        """On a planted network: what can be known from the features, and with the graph; see `ceilings`."""
        social = self.config.data.dataset == "social" and not self.config.data.shuffle_labels
        return ceilings(self.graph, self.config.synthetic) if social else {}

    def describe(self) -> list[str]:
        """Sizes, and what a batch is."""
        graph = self.graph
        sampling = self.config.sampling
        train = self.config.train
        lines = [
            f"{graph.name}: {graph.num_nodes:,} nodes, {graph.num_edges:,} edges, {graph.num_features} features, "
            f"{graph.num_classes} classes; {len(graph.train):,} train, {len(graph.val):,} validation, "
            f"{len(graph.test):,} test",
            *self.whole.notes,
        ]
        if sampling.kind == "clusters":
            return [*lines, f"a batch is {sampling.clusters_per_batch} of {sampling.clusters} clusters"]
        epochs = train.steps * train.batch_size / len(graph.train)
        return [
            *lines,
            f"a batch is {train.batch_size} nodes with up to {' x '.join(map(str, sampling.fanouts))} neighbours; "
            f"{epochs:.1f} epochs",
        ]


def as_structure(block: Block, device: torch.device, symmetric: bool = False) -> Structure:
    """A block's edges as layers take them."""
    return Structure(block.indptr.to(device), block.indices.to(device), block.num_src, symmetric)


def infer(model: nn.Module, graph: Graph, chunk_edges: int, device: torch.device) -> Tensor:
    """Outputs (N, K) of all nodes with all their neighbours, in the CPU's memory.

    One layer for all nodes before the next, a range of rows of about `chunk_edges` edges at a time (Hamilton et al.
    2017 would compute a node's first layer again for everyone it is a neighbour of). Beside two layers' outputs, the
    memory is what a chunk's sources take. Layers that need the degrees of their sources see the whole graph at once
    instead.
    """
    if getattr(model, "config", None) is None or model.config.layer not in BIPARTITE:
        whole = graph.to(device)
        return model(whole.features, whole.structure()).cpu()
    sampler = NeighborSampler(graph.indptr, graph.indices, [ALL])
    x: Tensor | SparseFeatures = graph.features
    for i in range(len(model.layers)):
        out: Tensor | None = None
        for start, stop in edge_chunks(graph.indptr, chunk_edges):
            sample = sampler.sample(torch.arange(start, stop))
            rows = x.rows(sample.nodes) if isinstance(x, SparseFeatures) else x.index_select(0, sample.nodes)
            rows = rows.to(device, torch.get_default_dtype())
            part = model.forward_layer(i, rows, as_structure(sample.blocks[0], device)).cpu()
            out = torch.empty(graph.num_nodes, part.shape[1], dtype=part.dtype) if out is None else out
            out[start:stop] = part
        x = out
    return x
