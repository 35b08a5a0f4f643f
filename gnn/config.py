"""Every setting of the gnn project, with its default and its unit. YAML files override these, `key=value` overrides
both.

This module imports nothing heavy, so that a mistake in a config is reported before PyTorch has loaded.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

from common.config import BaseConfig, require

PLANETOID = ("cora", "citeseer", "pubmed")


@dataclass(frozen=True)
class DataConfig:
    """Which graph or graphs, and which nodes are for what."""

    # karate, social and files need no download; tu and ogb take data.name
    dataset: Literal[
        "cora",
        "citeseer",
        "pubmed",
        "photo",
        "computers",
        "coauthor_cs",
        "coauthor_physics",
        "email_eu",
        "karate",
        "tu",
        "ogb",
        "social",
        "files",
    ] = "cora"
    name: str = ""  # dataset=tu: MUTAG, PROTEINS ...; dataset=ogb: ogbn-arxiv ...
    # dataset=files: text with two node ids a line (CSV, SNAP ...; packed or not), MatrixMarket, an npz with an array
    # `edges`, or a sparse matrix of SciPy; in data_root or here
    edges: str = ""
    # dataset=files: edges with weights, which no network here uses
    weights: Literal["refuse", "ignore"] = "refuse"
    # dataset=files: a row of numbers a node, or with a first column `id`; empty = nothing is known of a node but its
    # edges
    features: str = ""
    labels: str = ""  # dataset=files: a class a line, or two columns (id, class); empty or -1 = unknown
    splits: str = ""  # dataset=files: two columns (id, train or val or test), or an npz with arrays of these names
    split: Literal["public", "random"] = "public"  # public: as published with the dataset, where there is one
    train_per_class: int = 20  # random split; the next two as well
    val_per_class: int = 30  # random split: validation nodes of each class
    test_nodes: int = 0  # 0 = all others
    # rows of the features sum to one, as Kipf & Welling 2017 do with word counts; other features are left as they are
    normalize: bool = True
    # of the features; auto: sparse if fewer than one in ten are not zero
    storage: Literal["auto", "sparse", "dense"] = "auto"
    # a canary: with permuted labels nothing can be learned, so the accuracy must fall to chance
    shuffle_labels: bool = False

    def __post_init__(self) -> None:
        require(
            self.dataset not in ("tu", "ogb") or self.name,
            "data.name",
            f"must name the dataset when data.dataset={self.dataset}",
        )
        require(self.dataset != "files" or self.edges, "data.edges", "must name a file when data.dataset=files")
        require(self.train_per_class >= 1, "data.train_per_class", "must be at least 1")
        require(self.val_per_class >= 1, "data.val_per_class", "must be at least 1")
        require(self.test_nodes >= 0, "data.test_nodes", "must not be negative")


@dataclass(frozen=True)
class ModelConfig:
    """The network. The defaults are the GCN of Kipf & Welling 2017."""

    # what a node does with its neighbours; mlp: nothing
    layer: Literal["gcn", "gat", "gatv2", "sage", "gin", "appnp", "gcnii", "grand", "mlp"] = "gcn"
    hidden: int = 16  # width of the hidden layers; for attention that of all heads together
    layers: int = 2  # number of them, which is how far a node sees
    heads: int = 8  # gat, gatv2: heads of the hidden layers, side by side
    out_heads: int = 1  # gat, gatv2: heads of the last layer, averaged
    activation: Literal["relu", "elu", "selu", "tanh"] = "relu"  # between the layers
    # of each layer's input; where processes share a batch out (train.batch_size), N of them equal one without it only
    dropout: float = 0.5
    input_dropout: float = -1.0  # of the features alone; -1 = as model.dropout
    # gat, gatv2: of the attention weights, so that a node hears a random part of its neighbours
    attention_dropout: float = 0.0
    norm: Literal["none", "batch", "layer"] = "none"  # between the layers
    residual: bool = False  # add each layer's input to its output
    hops: int = 10  # appnp: propagation steps (K); grand: order of the random propagation (K)
    alpha: float = 0.1  # appnp: teleport; gcnii: share of the first layer in each
    theta: float = 0.5  # gcnii: lambda in beta_l = log(lambda / l + 1)
    drop_node: float = 0.5  # grand: share of nodes whose features are zeroed before the propagation
    samples: int = 4  # grand: augmentations a step (S)
    temperature: float = 0.5  # grand: sharpening (T)
    consistency: float = 1.0  # grand: weight of the consistency loss (lambda)
    # grand: steps over which that weight rises from zero; agreement on nothing is a trap at the start
    consistency_warmup: int = 0

    def __post_init__(self) -> None:
        for name in ("hidden", "layers", "heads", "out_heads", "samples"):
            require(getattr(self, name) >= 1, f"model.{name}", "must be at least 1")
        require(self.hops >= 0, "model.hops", "must not be negative")
        for name in ("dropout", "attention_dropout", "drop_node"):
            require(0 <= getattr(self, name) < 1, f"model.{name}", "must be in [0, 1)")
        require(
            self.input_dropout == -1 or 0 <= self.input_dropout < 1, "model.input_dropout", "must be in [0, 1), or -1"
        )
        require(
            self.layer not in ("gat", "gatv2") or self.hidden % self.heads == 0,
            "model.hidden",
            f"must be a multiple of model.heads={self.heads}",
        )
        require(0 < self.alpha <= 1 or self.layer not in ("appnp", "gcnii"), "model.alpha", "must be in (0, 1]")
        require(self.theta > 0, "model.theta", "must be positive")
        require(self.temperature > 0, "model.temperature", "must be positive")
        for name in ("consistency", "consistency_warmup"):
            require(getattr(self, name) >= 0, f"model.{name}", "must not be negative")


@dataclass(frozen=True)
class TrainConfig:
    """Optimisation, and how often it is repeated."""

    steps: int = 200  # updates of one seed; of a whole graph an update is an epoch
    seeds: int = 1  # runs one after another with seed, seed + 1, ...; their mean and spread is what is reported
    batch_size: int = 512  # sampled nodes: seed nodes a step; graphs: graphs a step; over all processes together
    lr: float = 0.01  # learning rate of Adam
    weight_decay: float = 5e-4  # L2 penalty of the first layer; of gcnii and appnp: of the layers that do not propagate
    weight_decay_rest: float = 0.0  # of all other weights
    decay: Literal["constant", "cosine"] = "constant"  # of the learning rate over the steps of a seed
    grad_clip: float = 0.0  # global norm; 0 = off
    patience: int = 0  # end a seed when the validation criterion has not improved for so many steps; 0 = never
    validate_every: int = 1  # steps
    log_every: int = 20  # steps
    save_every: int = 1000  # steps, counted over all seeds
    # CPU threads: the kernels of a small graph take microseconds, and more threads cost more than they give; 0 = all
    threads: int = 1

    def __post_init__(self) -> None:
        for name in ("steps", "seeds", "batch_size", "validate_every", "log_every", "save_every"):
            require(getattr(self, name) >= 1, f"train.{name}", "must be at least 1")
        for name in ("weight_decay", "weight_decay_rest", "grad_clip", "patience", "threads"):
            require(getattr(self, name) >= 0, f"train.{name}", "must not be negative")
        require(0 < self.lr < math.inf, "train.lr", "must be positive and finite")


@dataclass(frozen=True)
class LinkConfig:
    """task=link: which pairs of nodes are held out, and how links are predicted."""

    # supervised: train.batch_size edges a step, hidden from the encoder
    method: Literal["vgae", "gae", "maskgae", "supervised"] = "vgae"
    val_share: float = 0.05  # of the undirected edges; training keeps what is left
    test_share: float = 0.1  # of the undirected edges
    embedding: int = 16  # numbers a node that the decoder sees (D)
    embedding_norm: bool = False  # batch norm and model.activation after the encoder's last layer too, as MaskGAE does
    embedding_dropout: float = 0.0  # of the embeddings themselves, before the decoder
    decoder: Literal["inner", "mlp"] = "inner"  # inner: z_u . z_v; mlp: two dense layers on the element-wise product
    decoder_hidden: int = 32  # mlp: width of the hidden layer; of the degree decoder too
    decoder_dropout: float = 0.3  # mlp: of the element-wise product
    kl_weight: float = 1.0  # vgae: of the divergence from the prior, beside its 1 / N
    mask: Literal["edge", "path"] = "edge"  # maskgae: single edges, or the edges of random walks
    # maskgae: share of edges masked each step (mask=edge), or of nodes that a walk starts from (mask=path)
    mask_share: float = 0.7
    walk_length: int = 3  # mask=path: edges of a walk
    degree_weight: float = 2e-3  # maskgae: of the degree decoder's loss
    # evaluation: negatives of each positive for MRR, Hits@K and the hard metrics, half at either end
    num_negatives: int = 500

    def __post_init__(self) -> None:
        for name in ("val_share", "test_share"):
            require(0 < getattr(self, name) < 1, f"link.{name}", "must be in (0, 1)")
        require(
            self.val_share + self.test_share < 1,
            "link.test_share",
            f"and link.val_share={self.val_share} leave no edges to train on",
        )
        for name in ("embedding", "decoder_hidden", "walk_length"):
            require(getattr(self, name) >= 1, f"link.{name}", "must be at least 1")
        for name in ("decoder_dropout", "embedding_dropout"):
            require(0 <= getattr(self, name) < 1, f"link.{name}", "must be in [0, 1)")
        for name in ("kl_weight", "degree_weight"):
            require(getattr(self, name) >= 0, f"link.{name}", "must not be negative")
        require(0 < self.mask_share < 1, "link.mask_share", "must be in (0, 1)")
        require(
            self.num_negatives >= 2 and self.num_negatives % 2 == 0,
            "link.num_negatives",
            "must be an even number above 0",
        )


@dataclass(frozen=True)
class CommunityConfig:
    """task=community: how many groups, and what holds them apart."""

    num_communities: int = 0  # k, the most that can be found; 0 = as many as the labels have classes
    collapse: float = 1.0  # weight of the penalty on unequal community sizes
    dropout: float = 0.5  # of the assignment logits, before the softmax
    skip: bool = True  # add the features' own projection to the encoder's output
    resolution: float = 1.0  # gamma of the modularity that Louvain and Leiden maximise; what is reported is always at 1
    restarts: int = 10  # runs of Louvain and Leiden for the table; the highest modularity counts

    def __post_init__(self) -> None:
        require(self.num_communities >= 0, "community.num_communities", "must not be negative")
        require(self.collapse >= 0, "community.collapse", "must not be negative")
        require(0 <= self.dropout < 1, "community.dropout", "must be in [0, 1)")
        require(0 < self.resolution < math.inf, "community.resolution", "must be positive and finite")
        require(self.restarts >= 1, "community.restarts", "must be at least 1")


@dataclass(frozen=True)
class GraphConfig:
    """task=graph: a label for a whole graph, by cross-validation. `train.seeds` repeats it with other folds."""

    folds: int = 10  # each is held out once
    # honest: a part of the training folds chooses the weights, and the held-out fold is looked at by gnn.eval alone
    # (Errica et al. 2020)
    # gin: the held-out folds' accuracy is followed, and the step with the best mean over the folds reported (Xu et al.
    # 2019): optimistic
    protocol: Literal["honest", "gin"] = "honest"
    validation: float = 0.1  # honest: share of the training folds that chooses the weights, as one in a whole number
    # honest: the lowest loss, or the highest accuracy (then the lower loss)
    choose_by: Literal["loss", "accuracy"] = "loss"
    # over the nodes of a graph; the sum alone tells two copies of a graph from one
    readout: Literal["sum", "mean", "max"] = "sum"
    jumping: bool = True  # read out the input and every layer (Xu et al. 2019, eq. 4.2); else the last layer only
    # batch norm of the readouts: sums over hundreds of nodes are large, and at first drown the loss
    readout_norm: bool = False
    learn_eps: bool = False  # model.layer=gin: learn epsilon; else it is 0 (GIN-0)
    max_degree: int = 200  # graphs without node labels: one-hot degrees up to this are the features

    def __post_init__(self) -> None:
        require(self.folds >= 2, "graph.folds", "must be at least 2")
        require(0 < self.validation <= 0.5, "graph.validation", "must be in (0, 0.5]")
        require(self.max_degree >= 1, "graph.max_degree", "must be at least 1")


@dataclass(frozen=True)
class SamplingConfig:
    """task=node with minibatches: which part of the graph a step sees."""

    kind: Literal["none", "neighbors", "clusters"] = "none"  # none: the whole graph in every step
    # neighbors: most neighbours kept of a seed node, of those, ...; one a layer; -1 = all
    fanouts: tuple[int, ...] = (10, 10)
    clusters: int = 100  # clusters: parts that the graph is cut into once
    clusters_per_batch: int = 10  # clusters: random parts that make a batch, with all edges among them
    validate: Literal["sampled", "full"] = "sampled"  # full: with all neighbours, layer by layer over all nodes
    # validate=sampled: at most so many validation nodes, always the same ones with the same neighbours
    validate_nodes: int = 5000
    chunk_edges: int = 1_000_000  # layer-wise inference: edges at a time, which bounds its memory
    prefetch: int = 2  # batches that a second thread prepares ahead; 0 = none

    def __post_init__(self) -> None:
        require(
            self.fanouts and all(f == -1 or f >= 1 for f in self.fanouts),
            "sampling.fanouts",
            "must be positive, or -1 for all",
        )
        for name in ("clusters", "clusters_per_batch", "validate_nodes", "chunk_edges"):
            require(getattr(self, name) >= 1, f"sampling.{name}", "must be at least 1")
        require(
            self.clusters_per_batch <= self.clusters,
            "sampling.clusters_per_batch",
            f"exceeds sampling.clusters={self.clusters}",
        )
        require(self.prefetch >= 0, "sampling.prefetch", "must not be negative")


@dataclass(frozen=True)
class SyntheticConfig:
    """dataset=social: a made-up social network with planted communities; nothing is downloaded."""

    generator: Literal["dcsbm", "rmat"] = "dcsbm"  # degree-corrected stochastic blocks, or recursive quadrants (R-MAT)
    nodes: int = 20_000  # of the graph
    edges: int = 200_000  # undirected edges drawn; self-loops and repeats are dropped, one to five in a hundred
    communities: int = 10  # the classes; rmat: equal ranges of the nodes' addresses
    # dcsbm: share of the edges that ignore the communities; 0 = all within one, 1 = the edges tell nothing
    mixing: float = 0.5
    exponent: float = 2.5  # dcsbm: the density of the expected degree k falls as k^-exponent
    max_degree: float = 0.0  # dcsbm: largest expected degree; 0 = sqrt(2 edges)
    # dcsbm: community c = 0, 1, ... has a share in proportion to (c + 1)^-size_skew of the nodes
    size_skew: float = 0.0
    features: int = 32  # numbers a node: its community's centre and noise of variance 1
    signal: float = 1.0  # distance of the centres from the origin; 0 = the features tell nothing
    label_noise: float = 0.0  # share of the labels that are another class, drawn at random
    unknown: float = 0.0  # share of the nodes without a label
    train_share: float = 0.1  # of the labelled nodes; the next two as well
    val_share: float = 0.1  # of the labelled nodes
    test_share: float = 0.5  # of the labelled nodes
    seed: int = 0  # of the graph, apart from the seed of the training
    # keep the graph in this folder and open it as memory maps, for graphs larger than memory; empty = in memory
    folder: str = ""

    def __post_init__(self) -> None:
        require(2 <= self.nodes < 2**31, "synthetic.nodes", "must be at least 2 and below 2^31")
        require(self.edges >= 1, "synthetic.edges", "must be at least 1")
        require(
            2 <= self.communities <= self.nodes,
            "synthetic.communities",
            "must be at least 2 and at most synthetic.nodes",
        )
        require(self.features >= 1, "synthetic.features", "must be at least 1")
        require(self.exponent > 1, "synthetic.exponent", "must be above 1")
        for name in ("max_degree", "size_skew", "signal"):
            require(getattr(self, name) >= 0, f"synthetic.{name}", "must not be negative")
        for name in ("mixing", "label_noise", "unknown", "train_share", "val_share", "test_share"):
            require(0 <= getattr(self, name) <= 1, f"synthetic.{name}", "must be in [0, 1]")
        shares = self.train_share + self.val_share + self.test_share
        require(shares < 1 + 1e-9, "synthetic.test_share", f"and the other two shares sum to {shares:g}, more than 1")


@dataclass(frozen=True)
class EvalConfig:
    """What `gnn.eval` adds to the metrics."""

    figures: bool = True  # draw pictures into figures/
    # write predictions.csv, communities.csv and embeddings.npz: what the first seed's network says, with your own ids
    outputs: bool = True
    tables: bool = True  # other methods on the same data: heuristics for links, Louvain and Leiden for communities


@dataclass(frozen=True)
class Config(BaseConfig):
    """One experiment."""

    # what is predicted: classes of nodes, links, labels of whole graphs, or communities
    task: Literal["node", "link", "graph", "community"] = "node"
    precision: Literal["fp32", "fp64"] = "fp32"  # type: ignore[assignment]  # sparse products have no 16-bit kernels
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    link: LinkConfig = field(default_factory=LinkConfig)
    community: CommunityConfig = field(default_factory=CommunityConfig)
    graph: GraphConfig = field(default_factory=GraphConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    synthetic: SyntheticConfig = field(default_factory=SyntheticConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)

    def __post_init__(self) -> None:
        require(
            (self.task == "graph") == (self.data.dataset == "tu"), "task", "graph and data.dataset=tu belong together"
        )
        require(
            self.sampling.kind == "none" or self.task == "node",
            "sampling.kind",
            f"only task=node is sampled, not task={self.task}",
        )
