"""One step of a small model on 1, 2 and 4 processes.

Writes FOLDER/<processes>_<loss>_<way>.pt: the loss and every gradient, as the first process has them after
DistributedDataParallel. PyTorch is loaded once, and the processes are forked from this one.
"""

from __future__ import annotations

import itertools
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from clip.contrastive import cached_backward, contrastive_loss
from clip.model import Output
from tests.clip import small

WORLDS, LOSSES, WAYS = (1, 2, 4), ("info_nce", "sigmoid"), ("ids", "pairs", "cache", "blocks")


def step(rank: int, world: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet{world}", rank=rank, world_size=world)
    for loss_name, way in itertools.product(LOSSES, WAYS):
        images, ids, image_ids, text_ids = small.batch(8, captions=1 if way == "pairs" else 2)
        # images 3 and 6 are one photograph, and lie in different processes
        image_ids[6] = image_ids[3]
        text_ids[text_ids == 6] = 3
        images, ids, image_ids, text_ids = (t.chunk(world)[rank] for t in (images, ids, image_ids, text_ids))
        model = DistributedDataParallel(small.build(loss=loss_name))

        def objective(output: Output, way=way, image_ids=image_ids, text_ids=text_ids) -> Tensor:
            if way == "pairs":
                return contrastive_loss(output)
            return contrastive_loss(output, image_ids, text_ids, block=1 if way == "blocks" else 0)

        if way == "cache":
            loss = cached_backward(model, images, ids, objective, 1)
        else:
            loss = objective(model(images, ids))
            loss.backward()
        mean = loss.detach().clone()
        dist.all_reduce(mean)
        if rank == 0:
            torch.save({"loss": mean / world, **small.gradients(model)}, folder / f"{world}_{loss_name}_{way}.pt")
    dist.destroy_process_group()


def main(folder: str) -> None:
    """All of it; to be called in a process that has computed nothing yet, for its threads would not be forked."""
    for world in WORLDS:
        mp.start_processes(step, (world, Path(folder)), nprocs=world, start_method="fork")
