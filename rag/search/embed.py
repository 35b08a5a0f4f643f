"""Text through the encoder, a batch at a time: similar lengths together, so that little of a batch is padding."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any, Generic, TypeVar

import numpy as np
import torch

from rag.data.corpus import Passage, Passages
from rag.model.encoder import Encoder, Tokenizer
from rag.search.vectors import VectorFiles

Array = np.ndarray[Any, Any]
M = TypeVar("M", bound=torch.nn.Module)
Track = Callable[[Iterable[Any]], Iterator[Any]]


class Batched(Generic[M]):
    """A network with everything it takes to read text.

    Args:
        autocast: precision of the forward pass, as `Run.autocast`.
        batch_size: texts at once.
    """

    def __init__(
        self,
        model: M,
        tokenizer: Tokenizer,
        autocast: Callable[[], AbstractContextManager[object]],
        batch_size: int,
        track: Track = iter,
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.autocast = autocast
        self.batch_size = batch_size
        self.track = track

    @torch.no_grad()
    def read(self, texts: Sequence[str], tokenize: Callable[[Array], Any], numbers: int) -> Array:
        """What the network says of each text. float32 (N, numbers)

        Args:
            tokenize: tokens of the texts with these indices.
        """
        device = next(self.model.parameters()).device
        was_training = self.model.training
        self.model.eval()
        found = np.empty((len(texts), numbers), np.float32)
        order = np.argsort([-len(text) for text in texts], kind="stable")  # the longest first: memory fails early
        try:
            for start in self.track(range(0, len(texts), self.batch_size)):
                rows = order[start : start + self.batch_size]
                tokens = {name: part.to(device) for name, part in tokenize(rows).items()}
                with self.autocast():
                    result = self.model(tokens)
                found[rows] = result.float().cpu().numpy()
        finally:
            self.model.train(was_training)
        return found


class Embedder(Batched[Encoder]):
    """A bi-encoder: text becomes vectors."""

    @property
    def precision(self) -> str:
        """What the forward pass computes in: vectors of another precision differ in their last digits."""
        device = next(self.model.parameters()).device.type
        with self.autocast():
            return str(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else "torch.float32"

    def questions(self, texts: Sequence[str]) -> Array:
        """float32 (Q, D), of length 1."""
        return self._embed(texts, self.tokenizer.questions)

    def passages(self, passages: Iterable[Passage]) -> Array:
        """float32 (N, D) of titles and texts."""
        return self._embed([passage.whole for passage in passages], self.tokenizer.passages)

    def _embed(self, texts: Sequence[str], tokenize: Callable[[Sequence[str]], Any]) -> Array:
        return self.read(texts, lambda rows: tokenize([texts[row] for row in rows]), self.model.dimension)


def embed_into(files: VectorFiles, passages: Passages, embedder: Embedder, shard: int) -> None:
    """Write the vectors of the passages that have none yet, a shard at a time: what an interruption may cost is one
    shard, and memory is that of one.
    """
    for start in range(len(files), len(passages), shard):
        files.append(embedder.passages(passages[start : min(start + shard, len(passages))]))


class Reranker(Batched[torch.nn.Module]):
    """A cross-encoder that puts the best passages into a better order."""

    def scores(self, questions: Sequence[str], texts: Sequence[str]) -> Array:
        """How well each text answers the question beside it. float32 (N,)"""

        def pairs(rows: Array) -> Any:
            return self.tokenizer.pairs([questions[row] for row in rows], [texts[row] for row in rows])

        return self.read(texts, pairs, 1)[:, 0]

    def rank(self, questions: Sequence[str], rows: Array, passages: Passages, depth: int) -> tuple[Array, Array]:
        """The first `depth` places of each ranking in a new order; those behind them stay behind.

        Args: rows (Q, K), -1 for empty places.
        Returns: scores (Q, K), -inf behind the first `depth`, and rows (Q, K).
        """
        depth = min(depth, rows.shape[1])
        where = np.argwhere(rows[:, :depth] >= 0)
        asked = [questions[query] for query, _ in where]
        texts = [passages[int(rows[query, place])].whole for query, place in where]
        scores = np.full(rows.shape, -np.inf, np.float32)
        if len(where):
            scores[where[:, 0], where[:, 1]] = self.scores(asked, texts)
        order = np.argsort(-scores[:, :depth], axis=1, kind="stable")
        ranked = np.concatenate([np.take_along_axis(rows[:, :depth], order, 1), rows[:, depth:]], axis=1)
        sorted_scores = np.take_along_axis(scores[:, :depth], order, 1)
        return np.concatenate([sorted_scores, scores[:, depth:]], axis=1), ranked
