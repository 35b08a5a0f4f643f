"""An encoder that marks where the answer stands, or that it stands nowhere (Devlin et al. 2019, section 4.2 and 4.3).

Question and passage are read together. Two numbers a token say how well an answer begins and ends there; those of the
first token, [CLS], stand for no answer. Of several passages the one wins whose best span is furthest above its own
score for no answer. What it says always stands in the passage it names: it cannot invent, nor put together.

Legend: B pairs of question and passage, T tokens of the longest, Q questions.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from common.checkpoint import CheckpointError, export_weights, read_weights
from common.config import to_yaml
from common.errors import ProjectError
from common.run import Run
from rag.config import SCRATCH, Config
from rag.data.corpus import Collection, Passage
from rag.model.encoder import Tokenizer, build_tokenizer, load_tokenizer, named_network, scratch_network
from rag.reader.examples import Context
from rag.reader.reader import Answer, Reader, Track, batches
from rag.reader.weights import MARKER

TOKENIZER_FOLDER = "tokenizer"
ROOM = 16  # tokens of a passage that there must be room for, beside the question


class SpanReader(nn.Module):
    """Scores for where an answer begins and ends.

    Args:
        network: an encoder of transformers.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self.head = nn.Linear(int(network.config.hidden_size), 2)  # type: ignore[union-attr, arg-type]
        nn.init.normal_(self.head.weight, std=0.02)
        nn.init.zeros_(self.head.bias)

    def forward(self, tokens: dict[str, Tensor], allowed: Tensor) -> Tensor:
        """float32 (B, T, 2), of beginning and end; -inf where no answer may be.

        Args:
            allowed: (B, T) bool: the passage's tokens and [CLS].
        """
        states = self.network(**tokens).last_hidden_state  # (B, T, D)
        scores: Tensor = self.head(states.to(self.head.weight.dtype)).float()
        return scores.masked_fill(~allowed.unsqueeze(2), -torch.inf)


@dataclass
class Pairs:
    """Questions with passages as an encoder reads them.

    Attributes:
        tokens: input_ids, attention_mask and, for most encoders, token_type_ids, each int64 (B, T).
        allowed: bool (B, T).
        offsets: int64 (B, T, 2): where in the passage's text a token begins and ends.
    """

    tokens: dict[str, Tensor]
    allowed: Tensor
    offsets: Tensor


@dataclass
class PairBatch:
    """`Pairs` with the places to be learned: of the first and last token, int64 (B, 2); 0 and 0 for no answer."""

    pairs: Pairs
    spans: Tensor


def encode_pairs(tokenizer: Tokenizer, questions: Sequence[str], texts: Sequence[str], device: torch.device) -> Pairs:
    """Each question with its passage. Only passages are cut; `ProjectError` for a question too long to leave room."""
    inner = tokenizer.inner
    longest = min(tokenizer.config.query_length + tokenizer.config.passage_length, int(inner.model_max_length))
    asked = inner(list(questions), add_special_tokens=False, verbose=False)["input_ids"]
    if max(len(ids) for ids in asked) + ROOM > longest:
        raise ProjectError(f"a question leaves no room in the {longest} tokens that {tokenizer.config.name} reads")
    found = inner(
        list(questions),
        list(texts),
        truncation="only_second",
        max_length=longest,
        padding=True,
        split_special_tokens=True,  # "[SEP]" in a passage is five letters
        return_offsets_mapping=True,
        return_tensors="pt",
    )
    offsets = found.pop("offset_mapping")
    second = torch.tensor([[part == 1 for part in found.sequence_ids(i)] for i in range(len(texts))])
    second[:, 0] = True
    return Pairs({name: value.to(device) for name, value in found.items()}, second.to(device), offsets)


def locate(pairs: Pairs, texts: Sequence[str], answers: Sequence[str]) -> Tensor:
    """Places of the first and last token of each answer where it first stands in its text; 0 and 0 where there is none,
    or where it was cut away. int64 (B, 2)
    """
    spans = torch.zeros(len(texts), 2, dtype=torch.int64)
    for row, (text, answer) in enumerate(zip(texts, answers, strict=True)):
        start = text.find(answer) if answer else -1
        if start < 0:
            continue
        inside = pairs.allowed[row].cpu().clone()  # on a CPU it would be the tensor itself
        inside[0] = False
        begins, ends = pairs.offsets[row].unbind(1)
        covered = inside & (begins < start + len(answer)) & (ends > start)
        places = covered.nonzero().flatten()
        whole = len(places) > 0 and int(begins[places[0]]) <= start and int(ends[places[-1]]) >= start + len(answer)
        if whole:
            spans[row, 0] = places[0]
            spans[row, 1] = places[-1]
    return spans


def span_loss(scores: Tensor, spans: Tensor) -> Tensor:
    """Mean cross-entropy of first and last token.

    Args: scores (B, T, 2), spans (B, 2).
    """
    each = scores.transpose(1, 2).flatten(0, 1)  # (2B, T): for a beginning, for an end, ...
    return nn.functional.cross_entropy(each, spans.flatten())


def best_spans(scores: Tensor, longest: int) -> tuple[Tensor, Tensor, Tensor]:
    """The best span of each row and how far it is above no answer.

    Args:
        scores: (B, T, 2).
        longest: tokens of a span.
    Returns:
        first and last token (B,), and start + end score of the span minus that of [CLS] (B,).
    """
    begin, end = scores.unbind(2)  # (B, T) both
    size = scores.shape[1]
    both = begin.unsqueeze(2) + end.unsqueeze(1)  # (B, T, T)
    band = torch.ones(size, size, dtype=torch.bool, device=scores.device).triu().tril(longest - 1)
    band[0] = False  # [CLS] is no part of a text
    both = both.masked_fill(~band, -torch.inf)
    best, place = both.flatten(1).max(1)
    return place // size, place % size, best - (begin[:, 0] + end[:, 0])


@dataclass
class ExtractiveReader:
    """Marks answers in passages; without passages it has none."""

    config: Config
    model: SpanReader
    tokenizer: Tokenizer
    device: torch.device
    track: Track = iter
    seconds: dict[str, float] = field(default_factory=lambda: {"prompt": 0.0, "read": 0.0, "write": 0.0})

    @torch.inference_mode()
    def answer(self, questions: Sequence[str], passages: Sequence[Sequence[Passage]] | None) -> list[Answer]:
        """See `Reader`."""
        if passages is None:
            return [Answer("", no_answer=1.0) for _ in questions]
        shown = [tuple(its[: self.config.reader.passages]) for its in passages]
        rows = [(q, place) for q, its in enumerate(shown) for place in range(len(its))]
        found: dict[int, tuple[float, int, str]] = {}  # question -> margin, place, text
        lengths = [(len(questions[q]) + len(shown[q][place].whole)) // 3 for q, place in rows]  # about: tokens
        for chosen in self.track(batches(lengths, 0, self.config.reader.batch_tokens)):
            started = time.perf_counter()
            asked = [questions[rows[i][0]] for i in chosen]
            texts = [shown[rows[i][0]][rows[i][1]].whole for i in chosen]
            pairs = encode_pairs(self.tokenizer, asked, texts, self.device)
            scores = self.model(pairs.tokens, pairs.allowed)
            first, last, margin = (part.tolist() for part in best_spans(scores, self.config.reader.answer_tokens))
            for i, row in enumerate(chosen):
                q, place = rows[row]
                begin, end = int(pairs.offsets[i, first[i], 0]), int(pairs.offsets[i, last[i], 1])
                better = (margin[i], -place) > (found[q][0], -found[q][1]) if q in found else True
                if better:
                    found[q] = (margin[i], place, texts[i][begin:end])
            self.seconds["read"] += time.perf_counter() - started
        return [self._finish(shown[q], found.get(q)) for q in range(len(questions))]

    def _finish(self, passages: tuple[Passage, ...], best: tuple[float, int, str] | None) -> Answer:
        if best is None:
            return Answer("", passages, no_answer=1.0)
        margin, place, text = best
        confidence = float(torch.sigmoid(torch.tensor(margin, dtype=torch.float64)))
        return Answer(text.strip(), passages, (place,), confidence, margin, 1 - confidence)

    def stream(self, question: str, passages: Sequence[Passage] | None) -> Iterator[str | Answer]:
        """See `Reader`; a marked answer is there all at once."""
        (answer,) = self.answer([question], None if passages is None else [passages])
        yield answer.text
        yield answer


class SpanTask:
    """The encoder in training; see `rag.reader.finetune.Task`. A row is a context's questions, each with each of its
    passages: where one does not have the answer, [CLS] is to be marked.
    """

    def __init__(self, config: Config, run: Run, collection: Collection) -> None:
        folder = run.folder / TOKENIZER_FOLDER
        if not (folder / "tokenizer.json").is_file():  # a resumed training has the same
            scratch = config.model.name == SCRATCH
            build_tokenizer(config.model, [p.whole for p in collection.passages] if scratch else None).save(folder)
        self.tokenizer = load_tokenizer(folder, config.model)
        self.model = build_spans(config, len(self.tokenizer.inner)).to(run.device)
        self.learned = self.model
        self.config = config
        self.run = run

    def row(self, context: Context) -> list[tuple[str, str, str]] | None:
        """Question, text and answer, empty where there is none, of each pair."""
        rows = []
        for asked in context.asked:
            for place, passage in enumerate(context.passages):
                answer = asked.answer if place in asked.sources and asked.answer in passage.whole else ""
                rows.append((asked.question, passage.whole, answer))
        return rows or None

    def length(self, row: list[tuple[str, str, str]]) -> int:
        """Letters of the longest pair, which go with tokens."""
        return max(len(question) + len(text) for question, text, _ in row)

    def collate(self, rows: list[list[tuple[str, str, str]]]) -> PairBatch:
        """See `Task`."""
        questions, texts, answers = zip(*(pair for row in rows for pair in row), strict=True)
        pairs = encode_pairs(self.tokenizer, questions, texts, self.run.device)
        return PairBatch(pairs, locate(pairs, texts, answers).to(self.run.device))

    def loss(self, net: Any, batch: PairBatch) -> Tensor:
        """See `Task`."""
        return span_loss(net(batch.pairs.tokens, batch.pairs.allowed), batch.spans)

    def reader(self) -> Reader:
        """See `Task`."""
        return ExtractiveReader(self.config, self.model, self.tokenizer, self.run.device, self.run.track)

    def export(self, folder: Path) -> None:
        """`reader.safetensors`."""
        facts = {"project": "rag", "step": str(self.run.step), "config": to_yaml(self.config)}
        export_weights(folder / MARKER, self.model.state_dict(), facts)


def build_spans(config: Config, vocabulary: int, weights: bool = True) -> SpanReader:
    """A reader on the encoder of the model section."""
    scratch = config.model.name == SCRATCH
    network: Any = scratch_network(config.model, vocabulary) if scratch else named_network(config.model, weights)
    if getattr(network, "pooler", None) is not None:
        network.pooler = None  # of no use here
    return SpanReader(network)


def load_extractive(config: Config, folder: Path, device: torch.device, track: Track = iter) -> ExtractiveReader:
    """The finished reader of a run folder."""
    weights, _ = read_weights(folder / MARKER)
    tokenizer = load_tokenizer(folder / TOKENIZER_FOLDER, config.model)
    model = build_spans(config, len(tokenizer.inner), weights=False)
    try:
        model.load_state_dict(weights)
    except RuntimeError:
        raise CheckpointError(f"{folder / MARKER} is of another encoder than the config's model section") from None
    return ExtractiveReader(config, model.to(device).eval().requires_grad_(False), tokenizer, device, track)
