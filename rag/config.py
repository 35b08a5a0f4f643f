"""Every setting of the rag project, with its default and its unit. YAML files override these, `key=value` overrides
both.

This module imports nothing heavy, so that a mistake in a config is reported before PyTorch has loaded.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

from common.config import BaseConfig, require
from rag.settings import ReaderConfig, ReaderTrainConfig

SCRATCH = "scratch"  # model.name of an encoder without pretrained weights
NEEDS_FOLDER = ("beir", "folder")


@dataclass(frozen=True)
class DataConfig:
    """Which passages and which questions."""

    # factworld: made up here, no download; squad: SQuAD v1.1 with all its passages as one corpus; nq: NQ-open over
    # Wikipedia; msmarco: MS MARCO passages; beir: a folder in BEIR's layout; scifact, cacm, cranfield: as published;
    # folder: your own documents
    dataset: Literal["factworld", "squad", "nq", "msmarco", "beir", "scifact", "cacm", "cranfield", "folder"] = (
        "factworld"
    )
    folder: str = ""  # beir and folder: where, in data_root or here, or absolute
    # squad: share of the training articles, drawn by seed, whose questions are for choosing; factworld: of the entities
    # beside those of training and test
    validation: float = 0.1
    max_passages: int = 0  # keep only N passages, those with answers first, the others drawn by seed; 0 = all
    max_questions: int = 0  # train on only N questions, drawn by seed; 0 = all
    chunk_words: int = 180  # folder: most words of a passage
    chunk_overlap: int = 30  # folder: words that a passage repeats from the one before it, where a section was cut
    max_megabytes: int = 50  # folder: larger files are counted and left out
    entities: int = 2000  # factworld: people, places and works together
    world: int = 0  # factworld: the seed of the world, apart from the run's

    def __post_init__(self) -> None:
        require(
            self.dataset not in NEEDS_FOLDER or self.folder, "data.folder", f"must name a folder for {self.dataset}"
        )
        require(0 < self.validation < 1, "data.validation", "must be in (0, 1)")
        for name in ("max_passages", "max_questions", "chunk_overlap", "world"):
            require(getattr(self, name) >= 0, f"data.{name}", "must not be negative")
        require(self.chunk_words >= 10, "data.chunk_words", "must be at least 10")
        require(self.chunk_overlap <= self.chunk_words // 2, "data.chunk_overlap", "must be at most half a chunk")
        require(self.max_megabytes >= 1, "data.max_megabytes", "must be at least 1")
        require(self.entities >= 60, "data.entities", "must be at least 60")


@dataclass(frozen=True)
class AnalyserConfig:
    """How text becomes the terms that BM25 counts."""

    stemmer: str = "english"  # a language that Snowball has a stemmer for; none = words as they are
    stop_words: Literal["none", "lucene", "scikit-learn"] = "lucene"  # 33 function words, or 318 common ones
    min_length: int = 1  # characters; shorter words are left out

    def __post_init__(self) -> None:
        require(self.min_length >= 1, "analyser.min_length", "must be at least 1")


@dataclass(frozen=True)
class BM25Config:
    """What a term is worth."""

    variant: Literal["lucene", "robertson", "atire", "bm25l", "bm25+"] = "lucene"  # formulas in rag/search/bm25.py
    k1: float = 1.2  # how slowly the worth of a repeated term saturates
    b: float = 0.75  # how much long passages are held back: 0 not at all, 1 in proportion to their length
    delta: float = 1.0  # bm25l and bm25+: what keeps long passages from being held back too much

    def __post_init__(self) -> None:
        require(0 <= self.k1 < math.inf, "bm25.k1", "must not be negative")
        require(0 <= self.b <= 1, "bm25.b", "must be in [0, 1]")
        require(0 <= self.delta < math.inf, "bm25.delta", "must not be negative")


@dataclass(frozen=True)
class ModelConfig:
    """The encoder, and what is made of it."""

    # bi_encoder: a vector for a question, one for a passage; cross_encoder: one score for both read together
    kind: Literal["bi_encoder", "cross_encoder"] = "bi_encoder"
    # an encoder of the Hugging Face Hub, or a folder with one; scratch: random weights and a vocabulary of its own
    name: str = "sentence-transformers/all-MiniLM-L6-v2"
    pooling: Literal["mean", "cls"] = "mean"  # a text's vector: mean over its tokens, or the first one's
    query_length: int = 64  # tokens; the rest of a longer question is left out
    passage_length: int = 256  # tokens
    query_prefix: str = ""  # such as "query: ", where an encoder was trained with one
    passage_prefix: str = ""  # such as "passage: "
    vocabulary: int = 8000  # scratch: word pieces, learned from the corpus; 261 of them are bytes and marks
    width: int = 128  # scratch: numbers a token
    layers: int = 2  # scratch
    heads: int = 4  # scratch: attention heads a layer
    dropout: float = -1.0  # of the encoder in training; below 0: what it came with
    # fused: PyTorch's own, where the encoder has it: the fastest on a GPU; written: plain products, faster in bf16 on a
    # CPU, with texts of more than 150 tokens only in chunks of about 8
    attention_kernel: Literal["fused", "written"] = "fused"

    def __post_init__(self) -> None:
        require(self.name, "model.name", "must name an encoder")
        for name in ("query_length", "passage_length"):
            require(getattr(self, name) >= 8, f"model.{name}", "must be at least 8 tokens")
        for name in ("width", "layers", "heads"):
            require(getattr(self, name) >= 1, f"model.{name}", "must be at least 1")
        require(self.vocabulary >= 300, "model.vocabulary", "must be at least 300: bytes and marks are 261")
        require(self.width % self.heads == 0, "model.width", "must be a multiple of model.heads")
        require(self.dropout < 1, "model.dropout", "must be below 1")


@dataclass(frozen=True)
class LossConfig:
    """What training minimises: the cross-entropy of the right passage among all candidates."""

    temperature: float = 0.05  # cosines are divided by it; sentence-transformers calls 1/temperature `scale`
    symmetric: bool = False  # also ask each passage for its question
    mask_false_negatives: bool = True  # a candidate that answers the question as well is not counted against it
    # also leave out candidates whose cosine is above that of the right passage plus this; 2 = never
    margin: float = 2.0

    def __post_init__(self) -> None:
        require(0 < self.temperature < math.inf, "loss.temperature", "must be positive")
        require(-2 <= self.margin <= 2, "loss.margin", "must be in [-2, 2]: cosines differ by at most 2")


@dataclass(frozen=True)
class NegativesConfig:
    """Hard negatives: what BM25 takes for an answer and is none."""

    count: int = 1  # a question and step, beside the other passages of the batch
    depth: int = 30  # drawn from so many best passages
    skip: int = 0  # leave out so many at the top: the likeliest to answer after all
    with_answer: bool = False  # keep passages that contain the answer; they may be right by accident

    def __post_init__(self) -> None:
        for name in ("count", "skip"):
            require(getattr(self, name) >= 0, f"negatives.{name}", "must not be negative")
        require(self.depth > self.skip, "negatives.depth", "must be above negatives.skip")


@dataclass(frozen=True)
class TrainConfig:
    """Optimisation."""

    steps: int = 2000  # updates
    batch_size: int = 64  # questions over all processes together
    chunk: int = 64  # texts that go through the encoder at once, passages of like length together
    # a batch of up to so many passages is encoded once, its whole graph kept; a larger one twice, chunk by chunk: the
    # same gradients with the memory of one chunk (gradient cache)
    one_pass: int = 256
    lr: float = 2e-5  # learning rate of AdamW, after the warm-up
    warmup: int = 200  # steps; at most a tenth of train.steps is used
    decay: Literal["constant", "linear", "cosine"] = "linear"  # shape after the warm-up
    weight_decay: float = 0.01  # of matrices
    grad_clip: float = 1.0  # global norm; 0 = off
    log_every: int = 50  # steps
    save_every: int = 500  # steps between checkpoints
    validate_every: int = 500  # steps between readings of validation nDCG; 0 = never
    validation_questions: int = 500  # questions of a reading, drawn by seed
    validation_passages: int = 3000  # passages that they are searched in: those that answer, then others

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "chunk", "log_every", "save_every"):
            require(getattr(self, name) >= 1, f"train.{name}", "must be at least 1")
        for name in ("warmup", "weight_decay", "grad_clip", "validate_every", "one_pass"):
            require(getattr(self, name) >= 0, f"train.{name}", "must not be negative")
        require(0 < self.lr < math.inf, "train.lr", "must be positive and finite")
        require(self.validation_questions >= 1, "train.validation_questions", "must be at least 1")
        require(self.validation_passages >= 10, "train.validation_passages", "must be at least 10")


@dataclass(frozen=True)
class IndexConfig:
    """Where vectors are kept and how they are looked up."""

    # faiss: files of one machine; milvus: a database, in a file or on a cluster
    backend: Literal["faiss", "milvus"] = "faiss"
    # faiss: flat compares with every vector; hnsw follows a graph of neighbours; ivfpq looks into the nearest of many
    # cells, at vectors of pq_bytes each
    kind: Literal["flat", "hnsw", "ivfpq"] = "flat"
    shard: int = 4096  # passages encoded between two files: what an interruption may cost
    memory_megabytes: int = 1024  # flat and re-ranking: most vectors in memory at once
    hnsw_links: int = 32  # links a vector and layer
    hnsw_build: int = 128  # candidates while building
    hnsw_search: int = 128  # candidates while searching
    cells: int = 0  # ivfpq: 0 = four times the square root of the number of vectors
    probe: int = 32  # ivfpq: cells looked into
    pq_bytes: int = 48  # ivfpq: a vector, beside 8 for its number
    rerank: int = 200  # hnsw and ivfpq: candidates whose exact cosine decides; 0 = take the index's word
    train_vectors: int = 100_000  # ivfpq: at most so many vectors, drawn by seed, make the cells and codes
    uri: str = ""  # milvus: a file (default milvus.db in the index's folder) or http://host:19530
    collection: str = "passages"  # milvus
    ask: str = ""  # rag.index: a question to search for once the index is up to date (--ask)

    def __post_init__(self) -> None:
        for name in ("shard", "memory_megabytes", "hnsw_links", "hnsw_build", "hnsw_search", "probe", "pq_bytes"):
            require(getattr(self, name) >= 1, f"index.{name}", "must be at least 1")
        for name in ("cells", "rerank"):
            require(getattr(self, name) >= 0, f"index.{name}", "must not be negative")
        require(self.train_vectors >= 256, "index.train_vectors", "must be at least 256")
        require(self.collection.isidentifier(), "index.collection", "must be letters, digits and underscores")
        require(not self.uri or self.backend == "milvus", "index.uri", "needs index.backend=milvus")


@dataclass(frozen=True)
class SearchConfig:
    """How a question is answered with passages."""

    mode: Literal["bm25", "dense", "hybrid"] = "hybrid"  # by words, by vectors, or by both
    k: int = 10  # passages
    depth: int = 100  # candidates of each side of a hybrid, and of what is ranked again
    # hybrid: reciprocal ranks (Cormack et al. 2009), or scores brought to [0, 1] and weighted
    fusion: Literal["rrf", "score"] = "rrf"
    rrf_k: float = 60.0  # rrf: 1 / (rrf_k + rank)
    dense_weight: float = 0.5  # of the dense side; the lexical one has the rest
    # 2: search again with what the first passage adds, for questions that need two passages; twice the time.
    # rag.train then trains both searches
    hops: Literal[1, 2] = 1

    def __post_init__(self) -> None:
        require(self.k >= 1, "search.k", "must be at least 1")
        require(self.depth >= self.k, "search.depth", "must be at least search.k")
        require(self.rrf_k >= 0, "search.rrf_k", "must not be negative")
        require(0 <= self.dense_weight <= 1, "search.dense_weight", "must be in [0, 1]")


@dataclass(frozen=True)
class RerankConfig:
    """Ranking the best passages again, by a cross-encoder that reads question and passage together."""

    # a run folder of model.kind=cross_encoder, or the name of one on the Hub; empty = none
    model: str = ""
    depth: int = 20  # passages a question
    batch_size: int = 32  # pairs read at once

    def __post_init__(self) -> None:
        require(self.depth >= 1, "rerank.depth", "must be at least 1")
        require(self.batch_size >= 1, "rerank.batch_size", "must be at least 1")


@dataclass(frozen=True)
class EvalConfig:
    """What `rag.eval` measures."""

    split: Literal["test", "validation"] = "test"  # validation: to choose; test: to report, once
    num_questions: int = 0  # questions of the split, drawn by seed; 0 = all
    zero_shot: bool = True  # also measure the encoder as it came, before training
    cutoffs: tuple[int, ...] = (1, 5, 20, 100)  # of recall
    batch_size: int = 64  # texts encoded at once; on a CPU 8 to 16 are faster
    resamples: int = 10_000  # of the bootstrap

    def __post_init__(self) -> None:
        require(self.num_questions >= 0, "eval.num_questions", "must not be negative")
        require(self.cutoffs and min(self.cutoffs) >= 1, "eval.cutoffs", "must be positive integers, at least one")
        require(self.batch_size >= 1, "eval.batch_size", "must be at least 1")
        require(self.resamples >= 100, "eval.resamples", "must be at least 100")


# -- answering ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class AnswerConfig:
    """What `rag.answer` measures."""

    split: Literal["test", "validation"] = "test"  # validation: to choose; test: to report, once
    num_questions: int = 500  # of the split, drawn by seed; 0 = all
    arms: tuple[str, ...] = ("closed_book", "random", "retrieved", "gold")  # what the same reader is given
    calibration: int = 100  # validation questions that the threshold of abstention is set on; 0 = leave it
    removed: bool = True  # also ask without the passages that have the answer: the reader should abstain
    edited: bool = True  # factworld: also ask with another answer in the right passage: the reader should follow
    poisoned: int = 0  # questions each of 30 hostile passages is tried on, with and without reader.neutralise
    label: str = ""  # files are named answers-<label>.json, ..., so that those of another reader stay
    resamples: int = 10_000  # of the bootstrap

    def __post_init__(self) -> None:
        known = ("closed_book", "random", "retrieved", "gold")
        require(self.arms and set(self.arms) <= set(known), "answer.arms", f"must be of {', '.join(known)}")
        for name in ("num_questions", "calibration", "poisoned"):
            require(getattr(self, name) >= 0, f"answer.{name}", "must not be negative")
        plain = self.label.replace("-", "").replace("_", "")
        require(not plain or plain.isalnum(), "answer.label", "must be letters, digits, - and _")
        require(self.resamples >= 100, "answer.resamples", "must be at least 100")


@dataclass(frozen=True)
class AskConfig:
    """`rag.ask`."""

    question: str = ""  # one question; empty = ask for them, one a line
    json: bool = False  # --json: answer, sources and timings as one JSON object a line


@dataclass(frozen=True)
class ServeConfig:
    """`rag.serve`."""

    host: str = "127.0.0.1"  # loopback: only this machine; anything else lets others read your documents
    port: int = 8000  # of the page: http://127.0.0.1:8000
    longest_question: int = 1000  # characters

    def __post_init__(self) -> None:
        require(0 <= self.port < 65536, "serve.port", "must be in [0, 65535]")
        require(self.longest_question >= 1, "serve.longest_question", "must be at least 1")


@dataclass(frozen=True)
class Config(BaseConfig):
    """One experiment."""

    data: DataConfig = field(default_factory=DataConfig)
    analyser: AnalyserConfig = field(default_factory=AnalyserConfig)
    bm25: BM25Config = field(default_factory=BM25Config)
    model: ModelConfig = field(default_factory=ModelConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    negatives: NegativesConfig = field(default_factory=NegativesConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    index: IndexConfig = field(default_factory=IndexConfig)
    search: SearchConfig = field(default_factory=SearchConfig)
    rerank: RerankConfig = field(default_factory=RerankConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    reader: ReaderConfig = field(default_factory=ReaderConfig)
    reader_train: ReaderTrainConfig = field(default_factory=ReaderTrainConfig)
    answer: AnswerConfig = field(default_factory=AnswerConfig)
    ask: AskConfig = field(default_factory=AskConfig)
    serve: ServeConfig = field(default_factory=ServeConfig)

    def __post_init__(self) -> None:
        require(
            self.model.kind == "bi_encoder" or self.negatives.count >= 1,
            "negatives.count",
            "must be at least 1 for a cross_encoder: it learns from passages read with the same question",
        )
