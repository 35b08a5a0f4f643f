"""Our GCN against PyTorch Geometric's: the same run on Cora, same weights.  python -m bench.gnn --data data

Both train the two-layer network of Kipf & Welling 2017 and evaluate it after every epoch. First the two must agree, on
outputs and on the gradient of every weight, or nothing is timed. Then each round times some epochs of ours, of the peer
in two forms, and of ours again, in one process, by CPU time on one thread. `peer` is the usual program: GCNConv with
its normalisation cached, an edge list, and the features as a dense matrix. `peer_sparse` hands PyTorch Geometric a
sparse adjacency matrix instead of the edge list, its own advice for speed. The ratio is peer / ours; the second ours
over the first is the A/A control, whose spread says which differences are noise. Without the data (--data), a random
graph of Cora's size takes its place.

With --layers, each layer's forward and backward pass on the same graph is compared in the same way.
The last line of stdout is one JSON object: ratio, aa_ratio, ours and peer (CPU-seconds for 200 epochs), and the
circumstances.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.gnn_peers import pair
from bench.rounds import circumstances, report
from common.config import resolve
from gnn.config import Config
from gnn.core.graph import Graph, build_graph, choose_storage
from gnn.core.sparse import SparseFeatures
from gnn.node.task import NodeTask

EPOCHS = 200  # of a run, what ours and peer are scaled to
TOLERANCE = 1e-5


class Random(NodeTask):
    """A random graph of Cora's size, for machines without Cora."""

    def __init__(self, config: Config, device: torch.device) -> None:
        super(NodeTask, self).__init__(config, device)
        rng = torch.Generator().manual_seed(0)
        x = (torch.rand(2708, 1433, generator=rng) < 49216 / (2708 * 1433)).float()
        order = torch.randperm(2708, generator=rng)
        self.whole = self.graph = build_graph(
            torch.randint(0, 2708, (2, 5278), generator=rng),
            2708,
            choose_storage(x),
            torch.randint(0, 7, (2708,), generator=rng),
            name="random",
            train=order[:140],
            val=order[140:640],
            test=order[640:1640],
        )
        self.random, self.structure = False, self.graph.structure()


class Ours:
    """Our network and what train.py does with it in an epoch."""

    def __init__(self, task: NodeTask) -> None:
        self.task, self.net = task, task.build(0)
        self.optimizer = task.optimizer(self.net)

    def epoch(self) -> float:
        """A step and an evaluation; the validation loss."""
        self.optimizer.zero_grad(set_to_none=True)
        self.task.loss(self.net.train(), 1).backward()
        self.optimizer.step()
        with torch.no_grad():
            return self.task.validate(self.net.eval())["val_loss"]

    @torch.no_grad()
    def test(self) -> float:
        """Test accuracy."""
        return self.task.test(self.net.eval())["test_accuracy"]


class Peer:
    """PyTorch Geometric's layers in the program that its users write."""

    def __init__(self, ours: Ours, graph: Graph, sparse: bool) -> None:
        try:
            from torch_geometric.nn import GCNConv
            from torch_geometric.utils import to_torch_csr_tensor
        except ImportError:
            raise SystemExit("bench.gnn compares with PyTorch Geometric: pip install torch-geometric") from None
        self.graph, widths = graph, [graph.num_features, ours.task.config.model.hidden, graph.num_classes]
        self.convs = nn.ModuleList(GCNConv(a, b, cached=True) for a, b in pairwise(widths))
        edges = graph.edges().flip(0)
        self.edges = (
            to_torch_csr_tensor(edges, size=(graph.num_nodes,) * 2).transpose(0, 1).to_sparse_csr() if sparse else edges
        )
        self.x = graph.features.dense() if isinstance(graph.features, SparseFeatures) else graph.features
        with torch.no_grad():
            for mine, theirs in zip(ours.net.layers, self.convs, strict=True):
                theirs.lin.weight.copy_(mine.weight.T)
                theirs.bias.copy_(mine.bias)
        train = ours.task.config.train
        self.optimizer = torch.optim.Adam(
            [
                {"params": self.convs[0].parameters(), "weight_decay": train.weight_decay},
                {"params": self.convs[1].parameters(), "weight_decay": 0.0},
            ],
            lr=train.lr,
        )
        self.p = ours.task.config.model.dropout

    def logits(self, p: float) -> Tensor:
        """Outputs with dropout p."""
        x = F.dropout(self.x, p, p > 0)
        x = F.relu(self.convs[0](x, self.edges))
        return self.convs[1](F.dropout(x, p, p > 0), self.edges)

    @torch.no_grad()
    def test(self) -> float:
        """Test accuracy."""
        g = self.graph
        return (self.logits(0.0)[g.test].argmax(dim=1) == g.labels[g.test]).double().mean().item()

    def epoch(self) -> float:
        """A step and an evaluation; the validation loss."""
        g = self.graph
        self.optimizer.zero_grad(set_to_none=True)
        F.cross_entropy(self.logits(self.p)[g.train], g.labels[g.train]).backward()
        self.optimizer.step()
        with torch.no_grad():
            out = self.logits(0.0)
            (out[g.val].argmax(dim=1) == g.labels[g.val]).double().mean().item()
            return F.cross_entropy(out[g.val], g.labels[g.val]).item()


def largest_difference(ours: Ours, peer: Peer) -> float:
    """Of the outputs and the gradients, relative to the largest entry of each."""
    g = ours.task.graph
    mine, theirs = ours.net.eval()(g.features, ours.task.structure), peer.logits(0.0)
    for out in (mine, theirs):
        F.cross_entropy(out[g.train], g.labels[g.train]).backward()
    pairs = [(mine, theirs)]
    for a, b in zip(ours.net.layers, peer.convs, strict=True):
        pairs += [(a.weight.grad.T, b.lin.weight.grad), (a.bias.grad, b.bias.grad)]
    ours.net.zero_grad(set_to_none=True)
    peer.convs.zero_grad(set_to_none=True)
    return max(float((a - b).detach().abs().max() / b.detach().abs().max()) for a, b in pairs)


def interleave(sides: dict[str, Callable[[], None]], rounds: int, repeats: int) -> dict[str, list[float]]:
    """CPU-seconds of one call of each side in each round; `again` is the first side once more."""
    first = next(iter(sides))
    order = [*sides.items(), ("again", sides[first])]
    times: dict[str, list[float]] = {name: [] for name, _ in order}
    for call in sides.values():
        for _ in range(3):
            call()
    for _ in range(rounds):
        for name, call in order:
            start = time.process_time()
            for _ in range(repeats):
                call()
            times[name].append((time.process_time() - start) / repeats)
    return times


def compare(times: dict[str, list[float]], ours: str, peer: str) -> list[float]:
    """Quartiles of the ratio of the rounds, peer over the mean of ours before and after it."""
    ratios = [p / ((a + b) / 2) for a, b, p in zip(times[ours], times["again"], times[peer], strict=True)]
    return [round(q, 3) for q in statistics.quantiles(ratios, n=4)]


def bench_run(args: argparse.Namespace) -> dict:
    """The whole run."""
    config = resolve(Config, Path("configs/gcn_cora.yaml"), [f"data_root={args.data}", *args.overrides])
    task = (NodeTask if (Path(args.data) / "planetoid/Cora/raw").is_dir() else Random)(config, torch.device("cpu"))
    torch.manual_seed(0)
    ours = Ours(task)
    peers = {"peer": Peer(ours, task.graph, False), "peer_sparse": Peer(ours, task.graph, True)}
    differences = {name: largest_difference(ours, peer) for name, peer in peers.items()}
    if max(differences.values()) > TOLERANCE:
        raise SystemExit(f"the networks differ by {differences}; nothing was timed")
    print(f"largest relative difference of outputs and gradients: {differences}")
    times = interleave(
        {"ours": ours.epoch, **{name: peer.epoch for name, peer in peers.items()}}, args.rounds, args.repeats
    )
    aa = statistics.quantiles([b / a for a, b in zip(times["ours"], times["again"], strict=True)], n=4)
    result = {"bench": f"GCN on {task.graph.name}, {EPOCHS} epochs with evaluation", "unit": "CPU-seconds a run"}
    for name in peers:
        low, middle, high = compare(times, "ours", name)
        result |= {"ratio" + name.removeprefix("peer"): middle, "ratio_iqr" + name.removeprefix("peer"): [low, high]}
    result |= {"aa_ratio": round(aa[1], 3), "aa_iqr": [round(aa[0], 3), round(aa[2], 3)]}
    return result | {name: round(EPOCHS * statistics.median(times[name]), 3) for name in ("ours", *peers)}


def compare_accuracy(args: argparse.Namespace) -> dict:
    """Whole runs of both for some seeds, from equal weights, each tested where its validation loss was lowest: mean
    and std in percent.
    """
    config = resolve(Config, Path("configs/gcn_cora.yaml"), [f"data_root={args.data}", *args.overrides])
    task, found = NodeTask(config, torch.device("cpu")), {"ours": [], "peer": []}
    for seed in range(args.seeds):
        torch.manual_seed(seed)
        ours = Ours(task)
        for name, side in (("ours", ours), ("peer", Peer(ours, task.graph, False))):
            torch.manual_seed(seed)
            best = (float("inf"), 0.0)
            for _ in range(EPOCHS):
                loss = side.epoch()
                best = min(best, (loss, side.test()))
            found[name].append(100 * best[1])
    result = {
        name: [round(statistics.fmean(values), 2), round(statistics.stdev(values), 2)] for name, values in found.items()
    }
    print(f"test accuracy over {args.seeds} seeds, mean and std: {result}", flush=True)
    return {"accuracy": result, "accuracy_seeds": args.seeds}


def bench_layers(args: argparse.Namespace) -> dict[str, list[float]]:
    """Quartiles of peer / ours for a forward and backward pass of each layer, width 64 to 64, on the graph of the
    run.
    """
    root = Path(args.data)
    config = resolve(Config, Path("configs/gcn_cora.yaml"), [f"data_root={args.data}"])
    graph = (NodeTask if (root / "planetoid/Cora/raw").is_dir() else Random)(config, torch.device("cpu")).graph
    structure, edges, table = graph.structure(), graph.edges().flip(0), {}
    for kind in ("gcn", "sage", "gin", "gat", "gatv2"):
        both = pair(kind, 64, 64)
        x = torch.randn(graph.num_nodes, 64, requires_grad=True)
        sides = {
            "ours": lambda both=both, x=x: both.ours(x, structure).sum().backward(),
            "peer": lambda both=both, x=x: both.peer(x, edges).sum().backward(),
        }
        a, b = both.ours(x, structure), both.peer(x, edges)
        if float((a - b).abs().max() / b.abs().max()) > TOLERANCE:
            raise SystemExit(f"{kind}: the layers differ; nothing was timed")
        table[kind] = compare(interleave(sides, args.rounds, 5), "ours", "peer")
        print(
            f"{kind:6} forward + backward, 64 to 64: peer / ours {table[kind][1]} ({table[kind][0]} to "
            f"{table[kind][2]})"
        )
    return table


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.gnn", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--data",
        default=os.environ.get("DATA_ROOT", "data"),
        help="data_root with planetoid/Cora (default: %(default)s)",
    )
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--repeats", type=int, default=10, help="epochs a side and round")
    parser.add_argument("--layers", action="store_true", help="also compare each layer")
    parser.add_argument(
        "--seeds", type=int, default=0, help="also train so many seeds of both to the end (16 CPU-seconds each)"
    )
    parser.add_argument("--out", type=Path, help="also write the JSON here")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    args = parser.parse_args()
    if args.rounds < 2:
        parser.error("--rounds must be at least 2")
    torch.set_num_threads(1)
    load = os.getloadavg()[0]
    result = bench_run(args)
    if args.layers:
        result["layers"] = bench_layers(args)
    if args.seeds > 1:
        result |= compare_accuracy(args)
    result |= {
        "rounds": args.rounds,
        "epochs_a_round": args.repeats,
        "threads": 1,
        "dtype": "float32",
        **circumstances(load, "torch", "torch-geometric"),
    }
    report(result, args.out)


if __name__ == "__main__":
    main()
