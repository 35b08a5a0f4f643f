"""GraphSAGE on sampled neighbourhoods, as fast as a machine goes: threads sample, the accelerator learns, nothing waits
that need not.

`gnn.train` prepares batches in one thread beside the training, which keeps one CPU core's step busy. A GPU's step takes
a few milliseconds, sampling from a graph of 10^8 edges ten times as many: so several threads sample, each with a
sampler of its own. The batch of a step is the one that `gnn.train` would have made, whichever thread makes it.

Legend: N nodes, E sampled edges, B seed nodes, n nodes of a batch, F features.
"""

from __future__ import annotations

import math
import threading
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.gnn_scale import peak
from common.errors import ProjectError
from gnn.core.sparse import Structure
from gnn.node.minibatch_task import SampledNodeTask
from gnn.node.neighbours import NeighborSampler, epoch_batch
from gnn.train import start_trial

WARM_UP = 10  # steps, not timed
PROBES = 20  # batches that the parts of a step are timed on


@dataclass
class Batch:
    """The tensors of one step, in the CPU's memory or on the device.

    Attributes:
        source: node numbers int64 (n,), or with features in the CPU's memory the features (n, F) themselves.
        blocks: (indptr, indices, num_src) of each layer, outermost first.
        labels: int64 (B,) of the seed nodes, which are the first rows.
        edges: sampled edges, all layers together.
    """

    source: Tensor
    blocks: list[tuple[Tensor, Tensor, int]]
    labels: Tensor
    edges: int

    def tensors(self) -> list[Tensor]:
        """All of them."""
        return [self.source, self.labels, *(part for block in self.blocks for part in block[:2])]

    def apply(self, function: Any) -> Batch:
        """The same with function(tensor) in place of each tensor."""
        blocks = [(function(indptr), function(indices), count) for indptr, indices, count in self.blocks]
        return Batch(function(self.source), blocks, function(self.labels), self.edges)


class Feed:
    """The batches of steps 1, 2, ..., made by `workers` threads, a few ahead.

    Args:
        gather: also look up the nodes' features, where those stay in the CPU's memory.
        pin: put tensors into page-locked memory, from which a GPU copies by itself.
    """

    def __init__(self, task: SampledNodeTask, batch_size: int, workers: int, gather: bool, pin: bool) -> None:
        self.task, self.size, self.workers, self.gather, self.pin = task, batch_size, workers, gather, pin
        self.own, self.lock, self.orders = threading.local(), threading.Lock(), {}
        self.threads = ThreadPoolExecutor(workers, "sampling")

    def seeds(self, step: int) -> Tensor:
        """(B,) seed nodes, as `node.neighbours.epoch_batch`, but an epoch is shuffled once and not at every step."""
        nodes = self.task.graph.train
        epoch, index = divmod(step - 1, max(1, len(nodes) // self.size))
        with self.lock:
            if epoch not in self.orders:
                self.orders = {number: order for number, order in self.orders.items() if number >= epoch - 1}
                self.orders[epoch] = epoch_batch(nodes, len(nodes), self.task.seed, epoch + 1)
            order = self.orders[epoch]
        return order[index * self.size : (index + 1) * self.size]

    def make(self, step: int) -> Batch:
        """The batch of a step; called in the threads, each of which keeps a sampler (4 N bytes)."""
        graph = self.task.graph
        if not hasattr(self.own, "sampler"):
            self.own.sampler = NeighborSampler(
                graph.indptr, graph.indices, self.task.config.sampling.fanouts, self.task.seed
            )
        seeds = self.seeds(step)
        sample = self.own.sampler.sample(seeds, step)
        blocks = [(block.indptr.int(), block.indices, block.num_src) for block in sample.blocks]
        source = graph.features.index_select(0, sample.nodes) if self.gather else sample.nodes
        batch = Batch(source, blocks, graph.labels[seeds], sample.num_edges)
        return batch.apply(Tensor.pin_memory) if self.pin else batch

    def batches(self, first: int) -> Iterator[Batch]:
        """Batches of steps first, first + 1, ... in order, without end; close the generator to stop."""
        waiting: deque[Future[Batch]] = deque()
        step = first
        try:
            while True:
                while len(waiting) < self.workers + 2:
                    waiting.append(self.threads.submit(self.make, step))
                    step += 1
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()

    def close(self) -> None:
        """End the threads."""
        self.threads.shutdown(wait=True, cancel_futures=True)


def wait_for(device: torch.device) -> None:
    """Until the device has done what it was told to."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class Learner:
    """A fresh GraphSAGE of the task's config, and its steps.

    Args:
        resident: all features are in the device's memory; else a batch brings its own.
    """

    def __init__(self, task: SampledNodeTask, device: torch.device, resident: bool) -> None:
        # where `start_trial` puts the model and validation its batches; the graph stays where it is
        task.device = device
        self.task, self.device = task, device
        self.model: nn.Module = start_trial(task, 0)
        self.optimizer = task.optimizer(self.model)
        self.features = task.graph.features.to(device) if resident else None

    def receive(self, batch: Batch) -> Batch:
        """Copy a batch to the device; returns at once where it comes from page-locked memory."""
        return batch.apply(lambda tensor: tensor.to(self.device, non_blocking=True))

    def step(self, batch: Batch) -> Tensor:
        """Forward, backward, update with a batch on the device; returns the loss, a scalar that is not read back."""
        x = batch.source if self.features is None else self.features.index_select(0, batch.source)
        structures = [Structure(*block) for block in batch.blocks]
        self.optimizer.zero_grad(set_to_none=True)
        loss = F.cross_entropy(self.model.train()(x, structures), batch.labels)
        loss.backward()
        self.optimizer.step()
        return loss.detach()


def measure(
    task: SampledNodeTask, device: torch.device, resident: bool, batch_size: int, seconds: float, cores: int
) -> dict[str, Any]:
    """Train for about `seconds`, then time the parts of a step one by one.

    For a GPU all of the CPU's `cores` but one sample; on the CPU a quarter of them do, and the step is computed with
    all.

    Returns a row: edges trained per second and all that explains it; `sample_ms` is a batch's share of the threads'
    time together, `copy_ms` and `step_ms` are of one batch alone, `waiting` the share of the training's time in which
    no batch was ready. Raises:
        ProjectError: the loss is not finite.
    """
    gpu = device.type == "cuda"
    workers = max(1, cores - 1) if gpu else max(1, cores // 4)  # on a CPU the step is the slower part
    threads = torch.get_num_threads()
    torch.set_num_threads(1 if gpu else cores)
    if gpu:
        torch.set_float32_matmul_precision("high")  # as `common.runtime.start` does for a training
        torch.cuda.reset_peak_memory_stats(device)
    feed, learner = (
        Feed(task, batch_size, workers, gather=gpu and not resident, pin=gpu),
        Learner(task, device, resident or not gpu),
    )
    try:
        row = train(feed, learner, seconds)
        with torch.no_grad():
            row["val_accuracy"] = task.validate(learner.model.eval())["val_accuracy"]
        row |= parts(feed, learner, row["steps"] + 1)
    finally:
        feed.close()
        torch.set_num_threads(threads)
    row["gpu_peak_gib"] = torch.cuda.max_memory_allocated(device) / 2**30 if gpu else None
    return row | {"host_peak_gib": peak(), "samplers": workers, "threads": 1 if gpu else cores}


def train(feed: Feed, learner: Learner, seconds: float) -> dict[str, Any]:
    """Steps for about `seconds` after a warm-up."""
    batches, device = feed.batches(1), learner.device
    first = [learner.step(learner.receive(next(batches))) for _ in range(WARM_UP)]
    wait_for(device)
    start, waited, edges, steps, last = time.perf_counter(), 0.0, 0, 0, deque(maxlen=WARM_UP)
    while time.perf_counter() - start < seconds or not steps:
        asked = time.perf_counter()
        batch = next(batches)
        waited += time.perf_counter() - asked
        last.append(learner.step(learner.receive(batch)))
        edges, steps = edges + batch.edges, steps + 1
    wait_for(device)
    total = time.perf_counter() - start
    batches.close()
    ends = [float(torch.stack(list(part)).mean()) for part in (first, last)]
    if not all(map(math.isfinite, ends)):
        raise ProjectError("the loss is not finite: nothing is reported")
    return {
        "edges_per_s": edges / total,
        "nodes_per_s": steps * len(batch.labels) / total,
        "steps": steps + WARM_UP,
        "edges_per_step": edges / steps,
        "ms": 1000 * total / steps,
        "waiting": waited / total,
        "first_loss": ends[0],
        "last_loss": ends[1],
    }


def parts(feed: Feed, learner: Learner, first: int) -> dict[str, float]:
    """Milliseconds a batch of sampling (all threads at once, nothing else running), of copying and of a step, each
    by itself.
    """
    batches, device = feed.batches(first), learner.device
    for _ in range(feed.workers + 2):  # made while nobody was asking
        next(batches)
    start = time.perf_counter()
    kept = [next(batches) for _ in range(max(PROBES, 2 * feed.workers))]
    found = {"sample_ms": 1000 * (time.perf_counter() - start) / len(kept)}
    batches.close()
    for name, function in (("copy_ms", learner.receive), ("step_ms", learner.step)):
        made, times = [], []
        for batch in kept[:PROBES]:
            wait_for(device)
            start = time.perf_counter()
            made.append(function(batch))
            wait_for(device)
            times.append(time.perf_counter() - start)
        found[name] = 1000 * sorted(times)[len(times) // 2]
        kept = made
    return found
