"""Many trainings of a GCN at once: S copies of the graph along the diagonal of one sparse matrix, S weight matrices in
one batched product.

A training of a small graph keeps a GPU idle: its kernels are shorter than their launch. Here one kernel does the work
of S trainings. Nothing is shared between them: each has its own initial weights, dropout masks, Adam moments and choice
of the step that is kept, as `gnn.train` makes them, so seed by seed the same thing happens as in S runs of it
(tests/bench/test_gpu_gnn.py).

Legend: S seeds, N nodes, E entries, F features, D width, K classes, T training nodes.
"""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common import runtime
from common.config import require
from common.errors import ProjectError
from common.files import write_figure
from gnn.config import Config, ModelConfig
from gnn.core.graph import choose_storage
from gnn.core.layers import glorot
from gnn.core.sparse import Matrix, SparseFeatures
from gnn.model import ACTIVATIONS, drop_features
from gnn.node.task import NodeTask
from gnn.train import INIT_STREAM, learning_rate


class BatchedGCN(nn.Module):
    """`gnn.model.GNN` of S seeds, layer=gcn: the weights have one axis more.

    forward: x (S N, S F) and matrix (S N, S N), both block-diagonal; returns logits (S, N, K).
    """

    def __init__(self, config: ModelConfig, seeds: int, in_features: int, out_features: int) -> None:
        super().__init__()
        self.config, self.seeds = config, seeds
        widths = [in_features, *[config.hidden] * (config.layers - 1), out_features]
        # (S, F, D) ... (S, D, K)
        self.weights = nn.ParameterList(glorot(seeds, a, b, fan=(a, b)) for a, b in pairwise(widths))
        self.biases = nn.ParameterList(nn.Parameter(torch.zeros(seeds, 1, b)) for b in widths[1:])
        self.activation = ACTIVATIONS[config.activation]

    def weight_groups(self) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
        """Weights of the first layer, and all others, as `gnn.model.GNN` groups them."""
        return [self.weights[0], self.biases[0]], [*list(self.weights)[1:], *list(self.biases)[1:]]

    def forward(self, x: SparseFeatures, matrix: Matrix) -> Tensor:
        config, h = self.config, x
        for i, (weight, bias) in enumerate(zip(self.weights, self.biases)):
            p = config.input_dropout if i == 0 and config.input_dropout >= 0 else config.dropout
            h = drop_features(h, p, self.training)  # independent in every copy of the graph
            h = self.propagate(h, matrix, weight) + bias  # (S, N, D)
            if i < len(self.weights) - 1:
                h = self.activation(h)
        return h

    def propagate(self, h: SparseFeatures | Tensor, matrix: Matrix, weight: Tensor) -> Tensor:
        """matrix h weight, in the order that `gnn.core.layers.GraphLayer.propagate` chooses: (S, N, D)."""
        S, a, b = weight.shape
        if isinstance(h, SparseFeatures):
            return (matrix @ (h @ weight.view(S * a, b))).view(S, -1, b)  # (S N, S F) (S F, D)
        if a >= b:
            return (matrix @ torch.bmm(h, weight).view(-1, b)).view(S, -1, b)
        return torch.bmm((matrix @ h.reshape(-1, a)).view(S, -1, a), weight)


def diagonal(matrix: Matrix, count: int) -> Matrix:
    """`count` copies of a sparse (N, M) matrix along the diagonal: (count N, count M)."""
    pattern, values = matrix.pattern.blocks(count), matrix.values.repeat(count)
    if isinstance(matrix, SparseFeatures):
        return SparseFeatures(pattern, values)
    return Matrix(pattern, values, matrix.symmetric)


class Best:
    """`gnn.train.Best` for S seeds: the weights of each with the lowest validation loss so far. Nothing here waits
    for the device.
    """

    def __init__(self, model: BatchedGCN, patience: int) -> None:
        device = model.weights[0].device
        self.patience = patience
        self.loss = torch.full((model.seeds,), torch.inf, device=device)
        self.step = torch.zeros(model.seeds, dtype=torch.int64, device=device)
        self.weights = [p.detach().clone() for p in model.parameters()]

    def update(self, loss: Tensor, step: int, model: BatchedGCN) -> None:
        """Take over the seeds whose validation loss (S,) is lower than ever; after `patience` steps without that a
        seed has ended.
        """
        better = (loss < self.loss) | (self.step == 0)  # NaN is never lower
        if self.patience:
            better &= step - self.step <= self.patience
        self.loss = torch.where(better, loss.nan_to_num(nan=torch.inf), self.loss)
        self.step = torch.where(better, step, self.step)
        for kept, now in zip(self.weights, model.parameters()):
            kept.copy_(torch.where(better[:, None, None], now.detach(), kept))

    def restore(self, model: BatchedGCN) -> None:
        """Give the model the weights that were kept."""
        with torch.no_grad():
            for parameter, kept in zip(model.parameters(), self.weights):
                parameter.copy_(kept)


def check(config: Config, task: NodeTask) -> None:
    """`ConfigError` for what is not trained here."""
    require(
        config.task == "node" and config.sampling.kind == "none",
        "task",
        "many seeds at once: node classification on the whole graph",
    )
    require(config.model.layer == "gcn", "model.layer", f"many seeds at once: gcn, not {config.model.layer}")
    require(
        config.model.norm == "none" and not config.model.residual,
        "model.norm",
        "many seeds at once: no norm, no residuals",
    )
    require(
        config.train.grad_clip == 0, "train.grad_clip", "many seeds at once: 0, for its norm is of one seed's gradients"
    )
    require(not task.random, "data.split", "many seeds at once: one split for all of them")


def losses(logits: Tensor, nodes: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy of each seed over some nodes (T,): logits (S, N, K) to (S,)."""
    S = len(logits)
    chosen = logits.index_select(1, nodes).flatten(0, 1)  # (S T, K)
    return F.cross_entropy(chosen, labels.repeat(S), reduction="none").view(S, -1).mean(dim=1)


def accuracies(logits: Tensor, nodes: Tensor, labels: Tensor) -> Tensor:
    """Share of the nodes (T,) that each seed has right: logits (S, N, K) to float64 (S,)."""
    return (logits.index_select(1, nodes).argmax(dim=2) == labels).double().mean(dim=1)


def train_together(
    task: NodeTask, first: int, count: int, model: BatchedGCN | None = None
) -> tuple[list[dict[str, float]], Tensor]:
    """Train `count` seeds at once, from number `first`; which numbers are together decides what is drawn, and nothing
    else does.

    Args:
        task: the graph on its device, as `gnn.task.build_task` makes it.
        model: initial weights; default fresh ones.
    Returns:
        For each seed what `gnn.eval` reports (seed, step, test_accuracy, val_accuracy), and the training losses (steps,
        S).
    Raises:
        ProjectError: a loss is not finite.
    """
    config, graph, device = task.config, task.graph, task.device
    check(config, task)
    sparse = graph.features if isinstance(graph.features, SparseFeatures) else choose_storage(graph.features, "sparse")
    x, matrix = diagonal(sparse, count), diagonal(task.structure.gcn(), count)
    train_labels, val_labels = graph.labels[graph.train], graph.labels[graph.val]
    runtime.seed_generators(device, config.seed, first, INIT_STREAM)
    model = model or BatchedGCN(config.model, count, graph.num_features, graph.num_classes).to(device)
    optimizer, best, curve = task.optimizer(model), Best(model, config.train.patience), []
    for step in range(1, config.train.steps + 1):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, config.train)
        runtime.seed_generators(device, config.seed, first, step)
        model.train()
        optimizer.zero_grad(set_to_none=True)
        loss = losses(model(x, matrix), graph.train, train_labels)  # (S,)
        loss.sum().backward()  # no weight is in two of the terms
        optimizer.step()
        curve.append(loss.detach())
        if step % config.train.validate_every == 0 or step == config.train.steps:
            model.eval()
            with torch.no_grad():
                best.update(losses(model(x, matrix), graph.val, val_labels), step, model)
    best.restore(model)
    model.eval()
    with torch.no_grad():
        logits = model(x, matrix)
    followed = torch.stack(curve)  # (steps, S)
    if not bool(followed.isfinite().all()):
        raise ProjectError("a training loss is not finite: nothing is reported")
    columns = {
        "step": best.step,
        "test_accuracy": accuracies(logits, graph.test, graph.labels[graph.test]),
        "val_accuracy": accuracies(logits, graph.val, val_labels),
    }
    values = zip(*(column.tolist() for column in columns.values()), strict=True)
    return [{"seed": task.seed_of(first + i), **dict(zip(columns, row))} for i, row in enumerate(values)], followed


def draw_histogram(path: Path, accuracy: list[float], title: str, published: float | None = None) -> None:
    """Test accuracies of the seeds, a bin for each number of papers there can be between the worst and the best, but
    at most 60.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import PercentFormatter

    values = np.asarray(accuracy)
    figure = Figure(figsize=(8, 4.5), dpi=100, layout="constrained")
    axes = figure.subplots()
    distinct = np.unique(values)
    axes.hist(values, bins=int(np.clip(len(distinct), 1, 60)), color="#0072B2", alpha=0.8)
    axes.axvline(values.mean(), color="#0f172a", linewidth=1.8, label=f"mean {values.mean():.2%}")
    for q in (0.05, 0.95):
        label = f"{q:.0%} quantile {np.quantile(values, q):.2%}"
        axes.axvline(np.quantile(values, q), color="#475569", linestyle="--", linewidth=1.2, label=label)
    if published is not None:
        axes.axvline(published, color="#D55E00", linewidth=1.6, label=f"published {published:.1%}")
    axes.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=1))
    axes.set(xlabel="test accuracy", ylabel="seeds", title=title)
    axes.grid(color="#e2e8f0", axis="y")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    write_figure(path, figure)
