"""Nearest neighbours among embeddings, by FAISS: exactly, or approximately in far less time.

    flat   every query is compared with every image: exact, and linear in their number
    hnsw   a graph whose edges join near vectors is walked from node to node towards the query (Malkov & Yashunin 2016,
           arXiv:1603.09320): logarithmic, and misses a few

Legend: N images, Q queries, E numbers of an embedding, K results.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from clip.gallery.store import Store
from common.errors import ProjectError
from common.files import atomic_open

Kind = Literal["flat", "hnsw"]
KINDS: tuple[Kind, ...] = get_args(Kind)
NEIGHBOURS = 32  # edges of a node on each level of the graph but the lowest, which has twice as many
BUILD_BREADTH = 200  # candidates that are kept while a node's edges are chosen
SEARCH_BREADTH = 128  # candidates that are kept while the graph is walked; more find more and take longer
MOST_DEAD = 0.2  # share of removed images above which the graph is built anew


def faiss() -> Any:
    """The library. `ProjectError` where it is not installed."""
    try:
        import faiss as library
    except ImportError:
        raise ProjectError("search needs FAISS: pip install faiss-cpu") from None
    return library


def build(kind: Kind, ids: np.ndarray, vectors: np.ndarray) -> Any:
    """An index of vectors float32 (N, E) of length 1 under numbers int64 (N,); similarity is their inner product, the
    cosine.
    """
    library = faiss()
    E = vectors.shape[1]
    if kind == "flat":
        plain = library.IndexFlatIP(E)
    else:
        plain = library.IndexHNSWFlat(E, NEIGHBOURS, library.METRIC_INNER_PRODUCT)
        plain.hnsw.efConstruction = BUILD_BREADTH
        plain.hnsw.efSearch = SEARCH_BREADTH
    index = library.IndexIDMap2(plain)
    index.add_with_ids(np.ascontiguousarray(vectors), ids)
    return index


def open_index(kind: Kind, store: Store) -> tuple[Any, np.ndarray]:
    """An index of all that the store holds, and the numbers that this is: int64 (N,).

    A flat one is made at once. The graph is kept beside the store: images that came since are added, and removed ones
    are passed over in the search until they are too many.
    """
    ids, vectors = store.vectors()
    if kind == "flat":
        return build(kind, ids, vectors), ids
    path = graph_path(store)
    index = _read(path, vectors.shape[1])
    present = np.empty(0, np.int64) if index is None else numbers_in(index)
    dead = np.setdiff1d(present, ids)
    if index is None or len(dead) > MOST_DEAD * len(present):
        index = build(kind, ids, vectors)
    else:
        fresh = ~np.isin(ids, present)
        if not fresh.any():
            return index, ids
        index.add_with_ids(np.ascontiguousarray(vectors[fresh]), ids[fresh])
    with atomic_open(path) as file:
        file.write(faiss().serialize_index(index).tobytes())
    for other in path.parent.glob(f"{store.path.name}-*.hnsw"):
        if other != path:  # of embeddings that were thrown away
            other.unlink(missing_ok=True)
    return index, ids


def search(index: Any, queries: np.ndarray, k: int, alive: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    """The most similar of each query, best first: scores float32 (Q, K) and numbers int64 (Q, K), K <= k.

    Args:
        queries: float32 (Q, E), of length 1.
        alive: int64, the numbers that may be found; None = all.
    """
    library = faiss()
    queries = np.ascontiguousarray(queries, dtype=np.float32)
    if alive is None or np.isin(numbers_in(index), alive).all():
        scores, found = index.search(queries, min(k, index.ntotal))
        return scores, found
    selector = library.IDSelectorBatch(alive)
    plain = library.downcast_index(index.index)
    if hasattr(plain, "hnsw"):
        settings = library.SearchParametersHNSW(sel=selector, efSearch=max(plain.hnsw.efSearch, k))
    else:
        settings = library.SearchParameters(sel=selector)
    return index.search(queries, min(k, len(alive)), params=settings)


def numbers_in(index: Any) -> np.ndarray:
    """Under which numbers an index holds vectors: int64 (N,)."""
    return faiss().vector_to_array(index.id_map)


def graph_path(store: Store) -> Path:
    """Where the graph of a store is kept; its name holds what sets apart the embeddings that it was made of."""
    return store.path.with_name(f"{store.path.name}-{store.generation}.hnsw")


def _read(path: Path, dimensions: int) -> Any:
    """A graph from its file; None where that is missing or damaged."""
    try:
        data = np.fromfile(path, dtype=np.uint8)
        index = faiss().deserialize_index(data)
    except (OSError, RuntimeError):
        return None
    return index if index.d == dimensions else None
