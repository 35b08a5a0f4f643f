"""Graphs from public datasets, from your own files, or made up: everything arrives as `Graph`.

Public datasets are read by PyTorch Geometric's dataset classes, which download what is missing and use raw files that
are in place.

Legend: N nodes, F features, M edges as listed in a file.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import io
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from common.errors import ProjectError
from common.runtime import mix_seed
from gnn.config import PLANETOID, Config, DataConfig
from gnn.core.graph import Graph, are_counts, build_graph, choose_storage, normalize_rows
from gnn.core.sparse import SparseFeatures
from gnn.data.files import from_files

NO_DOWNLOAD = "gcn_karate.yaml and sage_social.yaml need no download"
# dataset -> (folder below data_root, name that PyTorch Geometric gives it, raw files that people may put there
# themselves)
FOLDERS = {
    "cora": ("planetoid", "Cora", "ind.cora.*"),
    "citeseer": ("planetoid", "CiteSeer", "ind.citeseer.*"),
    "pubmed": ("planetoid", "PubMed", "ind.pubmed.*"),
    "photo": ("amazon", "Photo", "amazon_electronics_photo.npz"),
    "computers": ("amazon", "Computers", "amazon_electronics_computers.npz"),
    "coauthor_cs": ("coauthor", "CS", "ms_academic_cs.npz"),
    "coauthor_physics": ("coauthor", "Physics", "ms_academic_phy.npz"),
    "email_eu": ("email_eu_core", "", "email-Eu-core*.txt"),
}
CANNOT_WRITE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC)
SPLIT_STREAM = 7_000_003  # keeps the generator of splits apart from those of training


def load_graph(config: Config) -> Graph:
    """The graph that the config names, checked, with features stored as the config asks.

    Raises:
        ProjectError: files missing and not to be had, or wrong in themselves; the message says where which files go.
    """
    data = config.data
    if data.dataset == "social":
        from gnn.data.synthetic import load_social

        graph = load_social(config)
    elif data.dataset == "files":
        graph = from_files(data, Path(config.data_root))
    else:
        graph = from_pyg(data, Path(config.data_root))
    if data.dataset != "social":
        graph = prepare_features(graph, data)
    elif isinstance(graph.features, Tensor):
        graph = dataclasses.replace(graph, features=choose_storage(graph.features, data.storage))
    labels = graph.labels
    if data.shuffle_labels and labels is not None:
        rng = torch.Generator().manual_seed(mix_seed(config.seed, SPLIT_STREAM))
        labels = labels[torch.randperm(len(labels), generator=rng)]
    return dataclasses.replace(graph, labels=labels)


def prepare_features(graph: Graph, data: DataConfig) -> Graph:
    """Features normalised where that makes sense, stored as the config asks; without any, each node is its own."""
    x = graph.features
    if x is None:  # nothing but the edges is known
        x = SparseFeatures.identity(graph.num_nodes)
        return dataclasses.replace(graph, features=x.dense() if data.storage == "dense" else x)
    if data.normalize:
        values = x if isinstance(x, Tensor) else x.values
        # a sum that is negative or nearly zero blows up what it divides; the public datasets here hold words
        if data.dataset in FOLDERS or are_counts(values):
            x = normalize_rows(x)
        else:
            note = "the features are not counts (some are negative or fractions): left as they are, not divided by "
            graph = graph.described(graph.ids, graph.class_names, [f"{note}the sums of their rows"])
    return dataclasses.replace(graph, features=choose_storage(x, data.storage) if isinstance(x, Tensor) else x)


# -- public datasets ---------------------------------------------------------------------------------------------------


def from_pyg(data: DataConfig, root: Path) -> Graph:
    """A dataset of PyTorch Geometric (or, by name, of OGB) as a `Graph` with the split that it was published with,
    if any.
    """
    item = read_pyg(data.dataset, data.name, root)
    name = data.name or data.dataset
    labels = None if item.get("y") is None else item["y"].long().flatten()
    splits = {
        part: item[f"{part}_mask"].nonzero().flatten()
        for part in ("train", "val", "test")
        if item.get(f"{part}_mask") is not None
    }
    if data.dataset == "karate":  # four labelled members, one a community; half of the others choose the model
        others = (~item["train_mask"]).nonzero().flatten()
        splits |= {"val": others[::2], "test": others[1::2]}
    splits |= item.get("splits", {})
    graph = build_graph(item["edge_index"], item["num_nodes"], item.get("x"), labels, name=name, **splits)
    if data.dataset in PLANETOID:
        graph = drop_unlabelled(graph)
    return graph


def drop_unlabelled(graph: Graph) -> Graph:
    """Take papers without a single word out of the splits: CiteSeer's test ids have 15 gaps, of which only citations
    are known.

    They stay in the graph, so that ids keep their meaning. PyTorch Geometric gives them class 0; none of them is in the
    public split.
    """
    x = graph.features
    assert isinstance(x, Tensor)
    unknown = x.abs().sum(dim=1) == 0  # (N,)
    keep = {
        part: ids[~unknown[ids]] for part, ids in (("train", graph.train), ("val", graph.val), ("test", graph.test))
    }
    return dataclasses.replace(graph, labels=torch.where(unknown, -1, graph.labels), **keep)


def read_pyg(dataset: str, name: str, root: Path) -> dict[str, Any]:
    """One graph of a PyTorch Geometric dataset as a plain dict of tensors; `ProjectError` where it cannot be had."""
    if dataset == "ogb":
        return read_ogb(name, root)
    if dataset == "karate":
        from torch_geometric.datasets import KarateClub

        item = KarateClub()[0]
    else:
        folder, title, files = FOLDERS[dataset]
        place = root / folder / title / "raw" if title else root / folder / "raw"
        item = fetch(lambda: open_pyg(dataset, root / folder, title), f"{files} into {place}/")[0]
    return {**{key: value for key, value in item.items() if isinstance(value, Tensor)}, "num_nodes": item.num_nodes}


def open_pyg(dataset: str, folder: Path, title: str) -> Any:
    """The dataset object; downloads and processes what is missing."""
    from torch_geometric import datasets

    if dataset in PLANETOID:
        return datasets.Planetoid(str(folder), title)
    if dataset == "email_eu":
        return datasets.EmailEUCore(str(folder))
    return (datasets.Amazon if folder.name == "amazon" else datasets.Coauthor)(str(folder), title)


def read_ogb(name: str, root: Path) -> dict[str, Any]:
    """A node-property dataset of the Open Graph Benchmark, with its own split; needs the package ogb."""
    try:
        from ogb.nodeproppred import NodePropPredDataset
    except ImportError:
        raise ProjectError("data.dataset=ogb needs: pip install ogb") from None
    folder = root / "ogb"
    # its copy of what it has read is a pickle that PyTorch's safe loader refuses: it is made anew from the raw files
    (folder / name.replace("-", "_") / "processed/data_processed").unlink(missing_ok=True)
    dataset = fetch(lambda: NodePropPredDataset(name, root=str(folder)), f"{name} into {folder}/")
    graph, labels = dataset[0]
    splits = {
        new: torch.from_numpy(dataset.get_idx_split()[old])
        for new, old in (("train", "train"), ("val", "valid"), ("test", "test"))
    }
    return {
        "edge_index": torch.from_numpy(graph["edge_index"]),
        "num_nodes": int(graph["num_nodes"]),
        "x": torch.from_numpy(graph["node_feat"]),
        "y": torch.from_numpy(labels).flatten(),
        "splits": splits,
    }


@contextlib.contextmanager
def asked_nothing() -> Iterator[None]:
    """Whoever asks a question on the terminal meets its end: a batch job must not wait for an answer."""
    stdin = sys.stdin
    sys.stdin = io.StringIO()
    try:
        with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        sys.stdin = stdin


def fetch(read: Callable[[], Any], files: str) -> Any:
    """Call a dataset library's reader without its chatter; whatever goes wrong becomes one line that says which
    files go where.
    """
    try:
        with asked_nothing():
            return read()
    except ProjectError:
        raise
    except EOFError as error:
        raise ProjectError(
            f"the dataset's library asks whether it may download or update much; say yes to it once by hand, or put "
            f"{files}; {NO_DOWNLOAD}"
        ) from error
    except OSError as error:
        if error.errno not in CANNOT_WRITE:
            raise missing(error, files) from error
        raise ProjectError(
            f"cannot write {error.filename or 'the folder of the dataset'}: {error.strerror}; set data_root to a "
            "folder that can be written"
        ) from error
    except Exception as error:  # downloads fail in the ways of half a dozen libraries
        raise missing(error, files) from error


def missing(error: Exception, files: str) -> ProjectError:
    """What to say of a dataset that is not to be had."""
    reason = (str(error).splitlines() or [type(error).__name__])[0][:120]
    return ProjectError(
        f"the dataset is not there and could not be downloaded or read ({reason}); put {files} or set data_root; "
        f"{NO_DOWNLOAD}"
    )


# -- splits ------------------------------------------------------------------------------------------------------------


def random_split(graph: Graph, data: DataConfig, seed: int) -> Graph:
    """So many nodes of each class for training and validation, the rest for testing (Shchur et al. 2018): a function of
    the seed.

    Raises:
        ProjectError: a class has too few nodes; the message says which.
    """
    labels = graph.labels
    rng = torch.Generator().manual_seed(mix_seed(seed, SPLIT_STREAM))
    if labels is None:
        raise ProjectError(f"{graph.name}: no labels, so there is nothing to classify; set data.labels")
    train = []
    val = []
    taken = torch.zeros(graph.num_nodes, dtype=torch.bool)
    for c in range(graph.num_classes):
        nodes = (labels == c).nonzero().flatten()
        if len(nodes) <= data.train_per_class:
            raise ProjectError(
                f"{graph.name}: class {c} has {len(nodes)} nodes; data.train_per_class={data.train_per_class} leaves "
                "none "
                "to test on"
            )
        nodes = nodes[torch.randperm(len(nodes), generator=rng)]
        chosen = nodes[: data.train_per_class + data.val_per_class]
        train.append(chosen[: data.train_per_class])
        val.append(chosen[data.train_per_class :])
        taken[chosen] = True
    rest = ((labels >= 0) & ~taken).nonzero().flatten()
    rest = rest[torch.randperm(len(rest), generator=rng)]
    rest = rest[: data.test_nodes] if data.test_nodes else rest
    if not len(torch.cat(val)) or not len(rest):
        raise ProjectError(
            f"{graph.name}: too few labelled nodes for data.train_per_class={data.train_per_class} and "
            f"data.val_per_class={data.val_per_class}"
        )
    return dataclasses.replace(graph, train=torch.cat(train), val=torch.cat(val), test=rest)
