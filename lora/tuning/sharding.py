"""Several processes: rows shared out, and frozen bases that are larger than one device spread over all of them.

Fully sharded data parallelism (Zhao et al. 2023, PyTorch's `fully_shard`): every process keeps a part of each layer's
weights and collects the others just before the layer computes. The adapters are small: each process has them whole, and
their gradients are averaged here.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import nn

from common.blocks import blocks_of
from common.config import ConfigError
from common.run import Run

T = TypeVar("T")


def share_of(rows: Sequence[T], run: Run) -> Sequence[T]:
    """This process's rows of a batch. `ConfigError` where they cannot be divided evenly."""
    if len(rows) % run.world:
        raise ConfigError("train.batch_size", f"{len(rows)} must be divisible by the number of processes, {run.world}")
    return rows[run.rank :: run.world]


def without_sync(net: nn.Module, more_to_come: bool) -> contextlib.AbstractContextManager[Any]:
    """While more parts of a batch are to come, processes need not average their gradients yet."""
    wrapped = getattr(net, "_orig_mod", net)  # inside torch.compile
    if more_to_come and isinstance(wrapped, nn.parallel.DistributedDataParallel):
        return wrapped.no_sync()
    return contextlib.nullcontext()


def shard_model(objective: nn.Module, run: Run) -> nn.Module:
    """Spread the frozen weights of a model in its loss over all processes, layer by layer, in place."""
    if run.world == 1:
        run.display.say("note: train.sharding=fsdp does something under torchrun with several processes")
        return objective.to(run.device)
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(run.device.type, (run.world,))
    small = {parameter for parameter in objective.parameters() if parameter.requires_grad}
    for parameter in small:  # equal in all processes from the start: drawn by the seed
        parameter.data = parameter.data.to(run.device)
    for block in blocks_of(objective):
        fully_shard(block, mesh=mesh, ignored_params=small)
    fully_shard(objective, mesh=mesh, ignored_params=small)
    return objective


def average_gradients(parameters: Sequence[nn.Parameter], run: Run) -> None:
    """Replace each gradient by its mean over the processes."""
    grads = [parameter.grad for parameter in parameters if parameter.grad is not None]
    if run.world == 1 or not grads:
        return
    flat = torch.cat([grad.flatten() for grad in grads])  # one message instead of hundreds
    dist.all_reduce(flat)
    flat /= run.world
    for grad, mean in zip(grads, flat.split([grad.numel() for grad in grads]), strict=True):
        grad.copy_(mean.view_as(grad))
