"""Which task a config names. `Task` itself (task.py) knows none of them."""

from __future__ import annotations

import torch

from gnn.config import Config
from gnn.task import Task


def build_task(config: Config, device: torch.device) -> Task:
    """The task that the config names, its data loaded and checked."""
    return task_class(config)(config, device)


def task_class(config: Config) -> type[Task]:
    """Its class. Imported when it is asked for: some bring compiled loops and scipy, which take a second to load."""
    if config.task == "node" and config.sampling.kind != "none":
        from gnn.node.minibatch_task import SampledNodeTask

        return SampledNodeTask
    if config.task == "node":
        from gnn.node.task import NodeTask

        return NodeTask
    if config.task == "link":
        from gnn.link.task import LinkTask

        return LinkTask
    if config.task == "graph":
        from gnn.whole_graph.task import GraphTask

        return GraphTask
    from gnn.community.task import CommunityTask

    return CommunityTask
