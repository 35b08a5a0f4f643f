"""What is chosen on while a retriever trains: nDCG@10 of validation questions, in a part of the corpus that is small
enough to be encoded again and again.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from common.run import Run
from rag.config import Config
from rag.data.corpus import Collection, Passages, drawn
from rag.metrics.scores import ndcg_at
from rag.model.encoder import CrossEncoder, Encoder, Tokenizer
from rag.search.analyser import Analyser
from rag.search.bm25 import BM25
from rag.search.embed import Embedder, Reranker

QUESTIONS, PASSAGES = 7_500_001, 7_500_002  # streams of random numbers


class Validation:
    """Some validation questions, the passages that answer them, and others beside these; drawn from the seed."""

    def __init__(self, collection: Collection, config: Config) -> None:
        self.config = config
        asked = [question for question in collection.validation if question.relevant]
        chosen = drawn(config.train.validation_questions, len(asked), config.seed, QUESTIONS)
        self.questions = [asked[i] for i in chosen]
        rows = {row for question in self.questions for row in collection.rows_of(question)}
        others = drawn(config.train.validation_passages, len(collection.passages), config.seed, PASSAGES)
        for row in others.tolist():
            if len(rows) >= config.train.validation_passages:
                break
            rows.add(row)
        self.passages = Passages(collection.passages[row] for row in sorted(rows))

    def measure(self, model: Encoder | CrossEncoder, tokenizer: Tokenizer, run: Run) -> dict[str, float]:
        """`val_ndcg_at_10`; nothing where there are no validation questions."""
        if not self.questions:
            return {}
        asked = [question.text for question in self.questions]
        batch = self.config.eval.batch_size
        if isinstance(model, CrossEncoder):
            index = BM25(self.config.bm25, Analyser(self.config.analyser))
            index.add(passage.whole for passage in self.passages)
            _, rows = index.search(asked, self.config.rerank.depth)
            reranker = Reranker(model, tokenizer, run.autocast, batch)
            _, rows = reranker.rank(asked, rows, self.passages, self.config.rerank.depth)
        else:
            embedder = Embedder(model, tokenizer, run.autocast, batch)
            scores = embedder.questions(asked) @ embedder.passages(self.passages).T
            rows = np.argsort(-scores, axis=1, kind="stable")[:, :10]
        return {"val_ndcg_at_10": float(np.mean([self._ndcg(i, row) for i, row in enumerate(rows)]))}

    def _ndcg(self, place: int, rows: Sequence[int]) -> float:
        return ndcg_at([passage.id for passage in self.passages.ranked(rows)], self.questions[place].gold)
