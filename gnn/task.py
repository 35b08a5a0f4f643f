"""What the training loop asks of a task.

There is one loop (train.py) and there are four tasks, each in a folder of its own: nodes (node/task.py;
node/minibatch_task.py where a step sees only a part of the graph), links (link/), whole graphs (whole_graph/),
communities (community/). A task holds the data and knows losses and metrics; it never holds the model.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from common.checkpoint import weights_hash
from gnn.config import Config
from gnn.core.sparse import SparseFeatures


class Task:
    """One kind of question about graphs, for one dataset.

    A run repeats the training `num_trials` times. Everything random in trial t is a function of (config.seed + t, step)
    alone, so a trial gives the same result whether it runs first, last or resumed.

    Attributes:
        num_trials: how often the training is repeated: seeds, or folds of a cross-validation.
        shard: this process's rows of a batch that all processes have drawn alike.
        remarks: what a reader of the results should know, such as why a figure is missing.
    """

    def __init__(self, config: Config, device: torch.device) -> None:
        self.config = config
        self.device = device
        self.num_trials = config.train.seeds
        self.remarks: list[str] = []
        self.shard: Callable[[Tensor], Tensor] = lambda batch: batch

    def seed_of(self, trial: int) -> int:
        """The seed of a trial."""
        return self.config.seed + trial

    def build(self, trial: int) -> nn.Module:
        """A fresh model on the device, and the trial's own split where it has one. The global generator has been
        seeded.
        """
        raise NotImplementedError

    def optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        """Adam with L2 penalty, as the papers of this field use it. A model may group its weights with
        `weight_groups()`.
        """
        train = self.config.train
        first, rest = model.weight_groups() if hasattr(model, "weight_groups") else (list(model.parameters()), [])
        groups = [
            {"params": first, "weight_decay": train.weight_decay},
            {"params": rest, "weight_decay": train.weight_decay_rest},
        ]
        groups = [group for group in groups if group["params"]]
        return torch.optim.Adam(groups, lr=train.lr, fused=self.device.type in ("cpu", "cuda"))

    def loss(self, net: nn.Module, step: int) -> Tensor:
        """The loss of step 1, 2, ... of the current trial, a scalar."""
        raise NotImplementedError

    def validate(self, model: nn.Module) -> dict[str, float]:
        """What is logged of the held-out part; "criterion" (lower is better) chooses the weights to keep. Never sees
        the test part.
        """
        raise NotImplementedError

    def test(self, model: nn.Module) -> dict[str, float]:
        """The figures that are reported. Only the evaluation program calls this."""
        raise NotImplementedError

    def tables(self, model: nn.Module) -> dict[str, float]:
        """Other methods on the same data and split, under names with a suffix; once a run."""
        return {}

    def write_outputs(self, model: nn.Module, folder: Path) -> None:
        """Files of what the first trial's model says, under the names that nodes have where they come from."""

    def figures(self, model: nn.Module, folder: Path) -> None:
        """Pictures of the first trial."""

    def notes(self) -> tuple[str, ...]:
        """What was decided when the data was read."""
        graph = getattr(self, "whole", None) or getattr(self, "graph", None)
        return getattr(graph, "notes", ())

    def fingerprint(self) -> str:
        """SHA-256 of edges, labels and features as they were read, by which a resumed run knows its data."""
        data = getattr(self, "whole", None) or self.graph
        # a graph is a dataclass, which may have computed more than its fields; many graphs are a plain class
        names = [item.name for item in dataclasses.fields(data)] if dataclasses.is_dataclass(data) else list(vars(data))
        parts = {name: getattr(data, name) for name in names}
        parts |= {f"{name}.values": part.values for name, part in parts.items() if isinstance(part, SparseFeatures)}
        return weights_hash({name: part.cpu() for name, part in parts.items() if isinstance(part, Tensor)})

    def describe(self) -> list[str]:
        """Sizes of the data, for --dry-run and the start of a run."""
        return []
