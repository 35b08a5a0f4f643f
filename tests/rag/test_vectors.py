"""Flat, HNSW and IVF-PQ against a matrix product; files that are whole or absent."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import pytest

from common.config import ConfigError
from common.errors import ProjectError
from rag.config import IndexConfig
from rag.search.generations import Generations
from rag.search.vectors import VectorFiles, VectorIndex
from tests.helpers import ROOT, environment

D = 24


def clustered(count: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    centres = np.random.default_rng(99).standard_normal((20, D))
    points = centres[rng.integers(0, 20, count)] + 0.4 * rng.standard_normal((count, D))
    return (points / np.linalg.norm(points, axis=1, keepdims=True)).astype(np.float32)


def store(folder, vectors: np.ndarray, shard: int = 700) -> VectorFiles:
    files = VectorFiles(folder, D)
    for start in range(0, len(vectors), shard):
        files.append(vectors[start : start + shard])
    return files


def exact(vectors: np.ndarray, queries: np.ndarray, k: int, gone=()) -> tuple[np.ndarray, np.ndarray]:
    scores = queries.astype(np.float64) @ vectors.T.astype(np.float64)
    scores[:, list(gone)] = -np.inf
    rows = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    return np.take_along_axis(scores, rows, 1), rows


@pytest.mark.parametrize("memory", [1, 1024])
def test_flat_is_a_matrix_product(memory, tmp_path):
    vectors, queries = clustered(2000), clustered(30, seed=1)
    index = VectorIndex(store(tmp_path, vectors), IndexConfig(memory_megabytes=memory))
    index.remove(range(0, 2000, 3))
    scores, rows = index.search(queries, 15)
    expected, places = exact(vectors, queries, 15, range(0, 2000, 3))
    np.testing.assert_allclose(scores, expected, atol=1e-6)
    np.testing.assert_array_equal(rows, places)


@pytest.mark.parametrize("kind", ["hnsw", "ivfpq"])
def test_approximate_search_with_exact_reranking(kind, tmp_path):
    vectors, queries = clustered(3000), clustered(50, seed=1)
    config = IndexConfig(kind=kind, pq_bytes=12, cells=20, probe=8, rerank=100, shard=700)
    index = VectorIndex(store(tmp_path / "v", vectors), config).build()
    gone = list(range(0, 3000, 7))
    index.remove(gone)
    scores, rows = index.search(queries, 10)
    _, places = exact(vectors, queries, 10, gone)
    assert not set(rows.ravel().tolist()) & set(gone)
    recall = np.mean([len(set(a) & set(b)) / 10 for a, b in zip(rows, places, strict=True)])
    assert recall > 0.95
    np.testing.assert_allclose(scores, (queries[:, None] * vectors[rows]).sum(2), atol=1e-5)  # exact cosines
    index.save(tmp_path / "i")
    loaded = VectorIndex.load(tmp_path / "i", VectorFiles(tmp_path / "v", D), config)
    np.testing.assert_array_equal(loaded.search(queries, 10)[1], rows)
    assert "8 of 20 cells" in loaded.described if kind == "ivfpq" else "128 candidates" in loaded.described
    loaded = VectorIndex.load(tmp_path / "i", VectorFiles(tmp_path / "v", D), config, growing=True)
    loaded.files.append(clustered(100, seed=2))
    loaded.extend()
    assert loaded.search(clustered(100, seed=2), 1)[1][:, 0].tolist() == list(range(3000, 3100))


def test_ivfpq_looks_into_as_many_cells_as_it_is_told(tmp_path):
    vectors, queries = clustered(3000), clustered(50, seed=1)
    files = store(tmp_path, vectors)
    index = VectorIndex(files, IndexConfig(kind="ivfpq", pq_bytes=12, cells=60, rerank=300)).build()
    _, places = exact(vectors, queries, 10)
    recalls = []
    for probe in (1, 60):
        index.config = replace(index.config, probe=probe)
        _, rows = index.search(queries, 10)
        recalls.append(np.mean([len(set(a) & set(b)) / 10 for a, b in zip(rows, places, strict=True)]))
    assert recalls[0] < 0.9 and recalls[1] > 0.98


def test_fewer_vectors_than_wanted(tmp_path):
    index = VectorIndex(store(tmp_path, clustered(3)), IndexConfig())
    scores, rows = index.search(clustered(2, seed=1), 5)
    assert (rows[:, 3:] == -1).all() and np.isneginf(scores[:, 3:]).all() and (rows[:, :3] >= 0).all()
    empty = VectorIndex(VectorFiles(tmp_path / "none", D), IndexConfig())
    assert empty.search(clustered(1), 2)[1].tolist() == [[-1, -1]]


@pytest.mark.parametrize("kind", ["hnsw", "ivfpq"])
@pytest.mark.parametrize("count", [5, 300])
def test_small_approximate_indexes(kind, count, tmp_path):
    vectors = clustered(count)
    index = VectorIndex(store(tmp_path, vectors), IndexConfig(kind=kind, pq_bytes=12)).build()
    assert index.search(vectors, 1)[1][:, 0].tolist() == list(range(count))


def test_what_does_not_fit_is_refused(tmp_path):
    files = store(tmp_path / "v", clustered(10))
    with pytest.raises(ValueError, match="length 1"):
        files.append(2 * clustered(5))
    with pytest.raises(ProjectError, match="of another encoder"):
        VectorFiles(tmp_path / "v", D + 1)
    with pytest.raises(ProjectError, match="a query has 25 numbers"):
        VectorIndex(files, IndexConfig()).search(np.ones((1, 25)), 1)
    with pytest.raises(ConfigError, match="pq_bytes: must divide the 24"):
        VectorIndex(files, IndexConfig(kind="ivfpq", pq_bytes=7)).build()
    index = VectorIndex(files, IndexConfig())
    index.save(tmp_path / "i")
    files.append(clustered(5))
    with pytest.raises(ProjectError, match=r"is of 15 vectors|there are 15"):
        VectorIndex.load(tmp_path / "i", files, IndexConfig())
    with pytest.raises(ProjectError, match="cannot be read"):
        VectorIndex.load(tmp_path / "nowhere", files, IndexConfig())
    whole = files.path(0).read_bytes()
    files.path(0).write_bytes(whole[:-30])
    with pytest.raises(ProjectError, match="is damaged"):
        VectorFiles(tmp_path / "v", D)


# -- generations -------------------------------------------------------------------------------------------------------


def test_a_generation_counts_once_it_is_whole(tmp_path):
    states = Generations(tmp_path / "index")
    assert states.current() is None
    with states.next("a", {"number": 1}) as folder:
        (folder / "x").write_text("one")
    assert (states.current() / "x").read_text() == "one" and states.facts()["number"] == 1
    with pytest.raises(RuntimeError), states.next("b", {}) as folder:
        (folder / "x").write_text("two")
        raise RuntimeError
    assert (states.current() / "x").read_text() == "one"
    with states.next("b", {}) as folder:
        assert (folder / "x").read_text() == "two"  # left behind, and of the same making
    assert states.current().name == "000002" and not (tmp_path / "index/000001").exists()
    with pytest.raises(RuntimeError), states.next("c", {}) as folder:
        raise RuntimeError
    with states.next("d", {}) as folder:
        assert not list(folder.iterdir()) and not list((tmp_path / "index").glob(".building-c"))


WRITER = """
import sys
from pathlib import Path
from rag.search.generations import Generations
states = Generations(Path(sys.argv[1]))
print("ready", flush=True)
number = int((states.current() / "a").read_text()) if states.current() else 0
while True:
    number += 1
    with states.next(str(number), {}) as folder:
        for name in "ab":
            (folder / name).write_text(str(number))
"""


def test_killed_while_writing_the_one_before_opens(tmp_path):
    """kill -9 twenty times at random moments: there is always a whole generation, never an older one than before."""
    rng = np.random.default_rng(0)
    newest = 0
    for _ in range(20):
        child = subprocess.Popen(
            [sys.executable, "-c", WRITER, str(tmp_path / "index")], cwd=ROOT, env=environment(), stdout=subprocess.PIPE
        )
        assert child.stdout is not None and child.stdout.readline()
        time.sleep(float(rng.uniform(0, 0.05)))
        os.kill(child.pid, signal.SIGKILL)
        child.wait()
        current = Generations(tmp_path / "index").current()
        if current is not None:
            a, b = (int((current / name).read_text()) for name in "ab")
            assert a == b >= newest
            newest = a
    assert newest > 0
