"""A training step of the retriever against sentence-transformers, and by both attention kernels:

    python -m bench.rag_step [--config configs/rag_squad.yaml] [--rounds 9] [--batches 2] [--precision bf16]

Same weights, same batches of real questions, each with its passage and its hard negatives, same tokens. First, with
float64 networks, the losses (no candidate masked, as in MultipleNegativesRankingLoss) and the gradients of all weights
must agree between ours by either kernel and the peer; otherwise nothing is timed. (Our vectors and the loss are float32
in any case.) Then each round times, in one process, one thread, by CPU time, from texts to updated weights: ours as the
config says, ours with the other `model.attention_kernel`, the peer, which pads each column of texts to its longest, and
ours again.

`ratio` is the peer's time over ours, `ratio_kernel` the other kernel's over ours, `aa_ratio` ours again over ours. The
last line of stdout is one JSON object.
"""

from __future__ import annotations

import argparse
import itertools
import os
import statistics
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bench.rounds import circumstances, interleave, ours_of, ratio, report
from common.config import resolve
from common.runtime import use_threads
from rag.config import Config, LossConfig
from rag.data import Collection, load_collection
from rag.model.encoder import Encoder, Tokenizer, build_model, build_tokenizer
from rag.negatives import Batch, load_examples
from rag.search.hops import by_steps
from rag.train import backward, parameter_groups

TOLERANCE = 1e-4  # of losses and gradients, relative to the largest
LEARNING_RATE = 1e-5
Autocast = Callable[[], AbstractContextManager[object]]


class OneProcess:
    """What `backward` asks of a run."""

    rank = 0
    world = 1
    device = torch.device("cpu")
    scaler = torch.amp.GradScaler("cpu", enabled=False)

    def __init__(self, autocast: Autocast) -> None:
        self.autocast = autocast


class Ours:
    """Our encoder and a step of it."""

    def __init__(self, config: Config, weights: Encoder, tokenizer: Tokenizer, collection: Collection) -> None:
        self.tokenizer = tokenizer
        self.collection = collection
        self.model = build_model(config.model, len(tokenizer.inner), weights=False).train()
        self.model.load_state_dict(weights.state_dict())

    def backward(self, batch: Batch, config: Config, autocast: Autocast) -> Tensor:
        """Gradients of a batch's loss, which is returned."""
        run: Any = OneProcess(autocast)
        return backward(self.model, batch, self.collection, self.tokenizer, config, run).loss


class Peer:
    """The same encoder in sentence-transformers, with its loss."""

    def __init__(self, config: Config, weights: Encoder, tokenizer: Tokenizer, collection: Collection) -> None:
        from sentence_transformers import SentenceTransformer
        from sentence_transformers.losses import MultipleNegativesRankingLoss

        self.tokenizer = tokenizer
        self.collection = collection
        with tempfile.TemporaryDirectory() as folder:
            weights.network.save_pretrained(folder)
            tokenizer.save(Path(folder))
            self.model = SentenceTransformer(folder, device="cpu").train()  # with mean pooling, as it says
        self.loss = MultipleNegativesRankingLoss(self.model, scale=1 / config.loss.temperature)

    def backward(self, batch: Batch, config: Config, autocast: Autocast) -> Tensor:
        """See `Ours.backward`; every column of texts is a batch of its own."""
        columns = [batch.positives, *batch.negatives.T]
        texts = [[self.collection.passages[int(row)].whole for row in column] for column in columns]
        tokens = [self.tokenizer.questions(batch.questions), *map(self.tokenizer.passages, texts)]
        with autocast():
            loss: Tensor = self.loss(tokens, None)
        loss.backward()
        return loss.detach()


def check_same(sides: dict[str, Ours | Peer], batch: Batch, config: Config) -> dict[str, float]:
    """How far losses and gradients of each side are from ours, relative to the largest, by float64 networks and
    with every candidate counted; SystemExit where that is too far.
    """
    plain = replace(config, loss=LossConfig(temperature=config.loss.temperature, mask_false_negatives=False))
    found = {}
    for name, side in sides.items():
        side.model.double()
        loss = side.backward(batch, plain, nullcontext)
        found[name] = [loss, *(p.grad for p in encoder_of(side).parameters() if p.grad is not None)]
        side.model.zero_grad(set_to_none=True)
        side.model.float()  # the weights are what they were
    difference = {}
    for name, values in found.items():
        worst = 0.0
        for ours, theirs in zip(found["ours"], values, strict=True):
            worst = max(worst, float((ours - theirs).abs().max() / ours.abs().max().clamp_min(1e-3)))
        difference[name] = worst
        print(f"{name}: largest difference from ours {worst:.1e}")
        if worst > TOLERANCE:
            raise SystemExit("losses or gradients do not agree: nothing was timed")
    return difference


def encoder_of(side: Ours | Peer) -> nn.Module:
    """The network of transformers inside, whose weights have one order in both."""
    if isinstance(side, Ours):
        return side.model.network
    network: nn.Module = side.model[0].auto_model
    return network


def stepper(side: Ours | Peer, batches: list[Batch], config: Config, autocast: Autocast) -> Callable[[], None]:
    """A training step, through the batches in turn."""
    optimizer = torch.optim.AdamW(parameter_groups(side.model, config.train.weight_decay), lr=LEARNING_RATE)
    order: Iterator[Batch] = itertools.cycle(batches)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        side.backward(next(order), config, autocast)
        optimizer.step()

    return step


def compare(config: Config, rounds: int, count: int, precision: str) -> dict[str, Any]:
    """Equal first, then the times."""
    if config.model.kind == "cross_encoder" or config.model.pooling != "mean":
        raise SystemExit("only a bi-encoder with mean pooling is compared")
    collection = load_collection(config.data, config.data_root)
    if config.search.hops == 2:
        collection = by_steps(collection)
    examples = load_examples(collection, config, print, iter)
    tokenizer = build_tokenizer(config.model, [passage.whole for passage in collection.passages])
    torch.manual_seed(0)
    start = build_model(config.model, len(tokenizer.inner))
    assert isinstance(start, Encoder)
    other = "fused" if config.model.attention_kernel == "written" else "written"
    turned = replace(config, model=replace(config.model, attention_kernel=other))
    sides: dict[str, Ours | Peer] = {
        "ours": Ours(config, start, tokenizer, collection),
        other: Ours(turned, start, tokenizer, collection),
        "peer": Peer(config, start, tokenizer, collection),
    }
    draw = [examples.batch(i, config.train.batch_size, config.negatives.count, 1000) for i in range(1, count + 1)]
    difference = check_same(sides, few(draw[0], 16), config)
    autocast = partial(torch.autocast, "cpu", torch.bfloat16, enabled=precision == "bf16")
    times = interleave({name: stepper(side, draw, config, autocast) for name, side in sides.items()}, rounds, count)
    ours = ours_of(times)
    a_step = {name: statistics.median(seconds) / count for name, seconds in times.items()}
    return {
        **ratio("ratio", times["peer"], ours),
        **ratio("ratio_kernel", times[other], ours),
        **ratio("aa_ratio", times["again"], times["ours"]),
        "ours": a_step["ours"],
        "peer": a_step["peer"],
        other: a_step[other],
        "unit": "CPU seconds a step",
        "kernel": config.model.attention_kernel,
        "precision": precision,
        "difference": difference,
    }


def few(batch: Batch, count: int) -> Batch:
    """The first questions of a batch: float64 needs room."""
    return replace(
        batch,
        questions=batch.questions[:count],
        positives=batch.positives[:count],
        negatives=batch.negatives[:count],
        gold=batch.gold[:count],
    )


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=Path("configs/rag_squad.yaml"))
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--batches", type=int, default=2, help="steps of a block")
    parser.add_argument("--precision", choices=("bf16", "fp32"), default="bf16")
    parser.add_argument("--out", type=Path, help="also write the JSON here")
    parser.add_argument("settings", nargs="*", help="key=value, as in training")
    args = parser.parse_args(argv)
    use_threads(1)
    load = os.getloadavg()[0]
    config = resolve(Config, args.config, args.settings, args.config.stem)
    result = compare(config, args.rounds, args.batches, args.precision)
    result |= {
        "config": args.config.stem,
        "questions": config.train.batch_size,
        "chunk": config.train.chunk,
        "rounds": args.rounds,
        "threads": 1,
        **circumstances(load, "sentence-transformers", "transformers", "torch"),
    }
    report(result, args.out)


if __name__ == "__main__":
    main()
