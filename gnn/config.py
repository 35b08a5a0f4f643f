"""Every setting of the gnn project, with its default and its unit. YAML files override these, `key=value` overrides both.

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

    dataset: Literal["cora", "citeseer", "pubmed", "photo", "computers", "coauthor_cs", "coauthor_physics", "email_eu", "karate",
                     "tu", "ogb", "social", "files"] = "cora"
    name: str = ""  # dataset=tu: MUTAG, PROTEINS ...; dataset=ogb: ogbn-arxiv ...
    edges: str = ""  # dataset=files: a CSV or text file with two node ids a line, or an npz with an array `edges`; relative to data_root
    features: str = ""  # dataset=files: CSV without header or npz with an array `features`, a row a node; empty = one-hot node ids
    labels: str = ""  # dataset=files: CSV with a class a line (-1 = unknown) or npz with an array `labels`
    split: Literal["public", "random"] = "public"  # public: as published with the dataset, where there is one
    train_per_class: int = 20  # random split; the next two as well
    val_per_class: int = 30
    test_nodes: int = 0  # 0 = all others
    normalize: bool = True  # rows of the features sum to one, as Kipf & Welling 2017 do with word counts
    storage: Literal["auto", "sparse", "dense"] = "auto"  # of the features; auto: sparse if fewer than one in ten are not zero
    shuffle_labels: bool = False  # a canary: with permuted labels nothing can be learned, so the accuracy must fall to chance

    def __post_init__(self) -> None:
        require(self.dataset not in ("tu", "ogb") or self.name, "data.name", f"must name the dataset when data.dataset={self.dataset}")
        require(self.dataset != "files" or self.edges, "data.edges", "must name a file when data.dataset=files")
        require(self.train_per_class >= 1, "data.train_per_class", "must be at least 1")
        require(self.val_per_class >= 1, "data.val_per_class", "must be at least 1")
        require(self.test_nodes >= 0, "data.test_nodes", "must not be negative")


@dataclass(frozen=True)
class ModelConfig:
    """The network. The defaults are the GCN of Kipf & Welling 2017."""

    layer: Literal["gcn", "gat", "gatv2", "sage", "gin", "appnp", "gcnii", "grand", "mlp"] = "gcn"
    hidden: int = 16  # width of the hidden layers; for attention that of all heads together
    layers: int = 2
    heads: int = 8  # gat, gatv2: heads of the hidden layers, side by side
    out_heads: int = 1  # gat, gatv2: heads of the last layer, averaged
    activation: Literal["relu", "elu", "selu", "tanh"] = "relu"
    dropout: float = 0.5  # of each layer's input
    input_dropout: float = -1.0  # of the features alone; -1 = as model.dropout
    attention_dropout: float = 0.0  # gat, gatv2: of the attention weights, so that a node hears a random part of its neighbours
    norm: Literal["none", "batch", "layer"] = "none"  # between the layers
    residual: bool = False  # add each layer's input to its output
    hops: int = 10  # appnp: propagation steps (K); grand: order of the random propagation (K)
    alpha: float = 0.1  # appnp: teleport; gcnii: share of the first layer in each
    theta: float = 0.5  # gcnii: lambda in beta_l = log(lambda / l + 1)
    drop_node: float = 0.5  # grand: share of nodes whose features are zeroed before the propagation
    samples: int = 4  # grand: augmentations a step (S)
    temperature: float = 0.5  # grand: sharpening (T)
    consistency: float = 1.0  # grand: weight of the consistency loss (lambda)

    def __post_init__(self) -> None:
        for name in ("hidden", "layers", "heads", "out_heads", "samples"):
            require(getattr(self, name) >= 1, f"model.{name}", "must be at least 1")
        require(self.hops >= 0, "model.hops", "must not be negative")
        for name in ("dropout", "attention_dropout", "drop_node"):
            require(0 <= getattr(self, name) < 1, f"model.{name}", "must be in [0, 1)")
        require(self.input_dropout == -1 or 0 <= self.input_dropout < 1, "model.input_dropout", "must be in [0, 1), or -1")
        require(self.layer not in ("gat", "gatv2") or self.hidden % self.heads == 0, "model.hidden",
                f"must be a multiple of model.heads={self.heads}")
        require(0 < self.alpha <= 1 or self.layer not in ("appnp", "gcnii"), "model.alpha", "must be in (0, 1]")
        require(self.theta > 0, "model.theta", "must be positive")
        require(self.temperature > 0, "model.temperature", "must be positive")
        require(self.consistency >= 0, "model.consistency", "must not be negative")


@dataclass(frozen=True)
class TrainConfig:
    """Optimisation, and how often it is repeated."""

    steps: int = 200  # updates of one seed; of a whole graph an update is an epoch
    seeds: int = 1  # runs one after another with seed, seed + 1, ...; their mean and spread is what is reported
    batch_size: int = 512  # sampled nodes: seed nodes a step; graphs: graphs a step; over all processes together
    lr: float = 0.01
    weight_decay: float = 5e-4  # L2 penalty of the first layer; of gcnii and appnp: of the layers that do not propagate
    weight_decay_rest: float = 0.0  # of all other weights
    decay: Literal["constant", "cosine"] = "constant"  # of the learning rate over the steps of a seed
    grad_clip: float = 0.0  # global norm; 0 = off
    patience: int = 0  # end a seed when the validation criterion has not improved for so many steps; 0 = never
    validate_every: int = 1  # steps
    log_every: int = 20
    save_every: int = 1000  # steps, counted over all seeds
    threads: int = 1  # CPU threads: the kernels of a small graph take microseconds, and more threads cost more than they give; 0 = all

    def __post_init__(self) -> None:
        for name in ("steps", "seeds", "batch_size", "validate_every", "log_every", "save_every"):
            require(getattr(self, name) >= 1, f"train.{name}", "must be at least 1")
        for name in ("weight_decay", "weight_decay_rest", "grad_clip", "patience", "threads"):
            require(getattr(self, name) >= 0, f"train.{name}", "must not be negative")
        require(0 < self.lr < math.inf, "train.lr", "must be positive and finite")


@dataclass(frozen=True)
class LinkConfig:
    """task=link: which pairs of nodes are held out, and how links are predicted."""

    method: Literal["vgae", "gae", "maskgae", "supervised"] = "vgae"  # supervised: train.batch_size edges a step, hidden from the encoder
    val_share: float = 0.05  # of the undirected edges; training keeps what is left
    test_share: float = 0.1
    embedding: int = 16  # numbers a node that the decoder sees (D)
    embedding_norm: bool = False  # batch norm and model.activation after the encoder's last layer too, as MaskGAE does
    embedding_dropout: float = 0.0  # of the embeddings themselves, before the decoder
    decoder: Literal["inner", "mlp"] = "inner"  # inner: z_u . z_v; mlp: two dense layers on the element-wise product
    decoder_hidden: int = 32  # mlp: width of the hidden layer; of the degree decoder too
    decoder_dropout: float = 0.3  # mlp: of the element-wise product
    kl_weight: float = 1.0  # vgae: of the divergence from the prior, beside its 1 / N
    mask: Literal["edge", "path"] = "edge"  # maskgae: single edges, or the edges of random walks
    mask_share: float = 0.7  # maskgae: share of edges masked each step (mask=edge), or of nodes that a walk starts from (mask=path)
    walk_length: int = 3  # mask=path: edges of a walk
    degree_weight: float = 2e-3  # maskgae: of the degree decoder's loss
    num_negatives: int = 500  # evaluation: negatives of each positive for MRR, Hits@K and the hard metrics, half at either end

    def __post_init__(self) -> None:
        for name in ("val_share", "test_share"):
            require(0 < getattr(self, name) < 1, f"link.{name}", "must be in (0, 1)")
        require(self.val_share + self.test_share < 1, "link.test_share", f"and link.val_share={self.val_share} leave no edges to train on")
        for name in ("embedding", "decoder_hidden", "walk_length"):
            require(getattr(self, name) >= 1, f"link.{name}", "must be at least 1")
        for name in ("decoder_dropout", "embedding_dropout"):
            require(0 <= getattr(self, name) < 1, f"link.{name}", "must be in [0, 1)")
        for name in ("kl_weight", "degree_weight"):
            require(getattr(self, name) >= 0, f"link.{name}", "must not be negative")
        require(0 < self.mask_share < 1, "link.mask_share", "must be in (0, 1)")
        require(self.num_negatives >= 2 and self.num_negatives % 2 == 0, "link.num_negatives", "must be an even number above 0")


@dataclass(frozen=True)
class CommunityConfig:
    """task=community: how many groups, and what holds them apart."""


@dataclass(frozen=True)
class GraphConfig:
    """task=graph: a label for a whole graph."""


@dataclass(frozen=True)
class SamplingConfig:
    """task=node with minibatches: which part of the graph a step sees."""


@dataclass(frozen=True)
class SyntheticConfig:
    """dataset=social: a made-up social network with planted communities; nothing is downloaded."""


@dataclass(frozen=True)
class EvalConfig:
    """What `gnn.eval` adds to the metrics."""

    figures: bool = True
    tables: bool = True  # other methods on the same data: heuristics for links, Louvain and Leiden for communities


@dataclass(frozen=True)
class Config(BaseConfig):
    """One experiment."""

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
        require((self.task == "graph") == (self.data.dataset == "tu"), "task", "graph and data.dataset=tu belong together")
