"""Train a retriever, or the cross-encoder that ranks what it finds:

    python -m rag.train --config configs/rag_squad.yaml [key=value ...] [--resume] [--dry-run]
    python -m rag.train --config configs/rag_squad.yaml model.kind=cross_encoder run_dir=runs/rag_squad_rerank

Legend: B questions a step over all processes, b of this process, H hard negatives a question, D numbers a vector, W
processes, N texts of a process.
"""

# The config is read before PyTorch is imported, so that a typo is reported in a blink.
from common.config import Options, load, to_yaml
from rag.config import Config

if __name__ == "__main__":
    CONFIG, OPTIONS = load(Config, "rag")

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from common.checkpoint import export_weights
from common.config import require
from common.errors import ProjectError, exits_cleanly
from common.rates import learning_rate
from common.run import Run
from common.runtime import check_machine, count_parameters
from rag.data import Collection, load_collection
from rag.load import ENCODER, open_tokenizer, write_folder
from rag.model.encoder import CrossEncoder, Encoder, Tokenizer, Tokens, build_model, build_tokenizer, quiet
from rag.model.loss import Contrast, backward_in_chunks, contrastive_loss, list_loss, wrong_candidates
from rag.negatives import Batch, load_examples
from rag.metrics.validation import Validation
from rag.search.hops import by_steps


@exits_cleanly
def train(config: Config, options: Options) -> None:
    """Run one experiment, from its config to its last checkpoint and `model.safetensors`."""
    collection = load_collection(config.data, config.data_root)
    check_fit(config, collection)
    if config.search.hops == 2:
        collection = by_steps(collection)  # what is trained is what will be asked
    if options.dry_run:
        return describe(config, collection)
    run = Run.start(config, options)
    with run:
        for note in collection.notes:
            run.display.say(note)
        examples = load_examples(collection, config, run.display.say, run.track)
        if not options.resume:
            run.begin()  # an earlier run goes now: its tokenizer is not the new one's
        tokenizer = open_tokenizer(config, lambda: [passage.whole for passage in collection.passages], run)
        model = build_model(config.model, len(tokenizer.inner)).to(run.device)
        optimizer = torch.optim.AdamW(parameter_groups(model, config.train.weight_decay), lr=config.train.lr)
        done = run.resume(model=model, optimizer=optimizer)  # 0 when fresh
        net = run.prepare(model)  # the same weights, compiled or spread over processes
        validation = Validation(collection, config)
        run.display.say(
            f"{len(examples)} questions, {len(collection.passages)} passages, "
            f"{count_parameters(model) / 1e6:.2f}M parameters"
        )

        for step in run.steps(done, config.train.steps):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, config.train)
            batch = examples.batch(step, config.train.batch_size, config.negatives.count, config.seed)

            optimizer.zero_grad(set_to_none=True)
            net.train()
            result = backward(net, batch, collection, tokenizer, config, run)
            grad_norm = run.check_gradients(optimizer, result.loss, config.train.grad_clip)
            run.scaler.step(optimizer)  # in fp16 left out where a gradient overflowed; else simply optimizer.step()
            run.scaler.update()

            shown: dict[str, Tensor | float] = {
                "loss": result.loss,
                "accuracy": result.accuracy,
                "grad_norm": grad_norm,
                "lr": optimizer.param_groups[0]["lr"],
            }
            if run.due(step, config.train.validate_every):
                shown |= validation.measure(model, tokenizer, run)
            run.log(step, config.train.log_every, {"questions": config.train.batch_size}, **shown)
            if run.save_due(step, config.train.save_every):
                run.save(step, model=model, optimizer=optimizer)
        if run.is_main:
            export(run, config, model, tokenizer)


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, object]]:
    """Matrices, which are decayed, and vectors (biases, layer norms), which are not."""
    matrices = [parameter for parameter in model.parameters() if parameter.ndim >= 2]
    vectors = [parameter for parameter in model.parameters() if parameter.ndim < 2]
    return [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]


def passages_of(batch: Batch, part: slice, kind: str) -> np.ndarray[Any, Any]:
    """The passages of some of a batch's questions, as rows of the corpus: each question's own and then the hard
    negatives of all (bi-encoder), or question by question its own and its negatives (cross-encoder). (b * (1 + H),)
    """
    if kind == "cross_encoder":
        return np.concatenate([batch.positives[part, None], batch.negatives[part]], axis=1).reshape(-1)
    return np.concatenate([batch.positives[part], batch.negatives[part].reshape(-1)])


def shares(batch: Batch, world: int) -> list[slice]:
    """Each process's questions. `ConfigError` where they cannot be divided evenly."""
    size, rest = divmod(len(batch.questions), world)
    require(rest == 0, "train.batch_size", f"must be divisible by the number of processes, {world}")
    return [slice(rank * size, (rank + 1) * size) for rank in range(world)]


def tokenize(
    batch: Batch, collection: Collection, tokenizer: Tokenizer, config: Config, run: Run
) -> tuple[list[Tokens], Tensor]:
    """This process's texts in chunks: its questions and then their passages (bi-encoder), or each passage with its
    question (cross-encoder). Short passages come first: a chunk's texts are of like length and little of it is padding.

    Returns:
        The chunks, and the place of each of their texts among the questions and then `passages_of`, int64 (N,).
    """
    mine = shares(batch, run.world)[run.rank]
    questions = batch.questions[mine]
    passages = [collection.passages[int(row)].whole for row in passages_of(batch, mine, config.model.kind)]
    order = sorted(range(len(passages)), key=lambda place: len(passages[place]))
    texts = [passages[place] for place in order]
    chunk = config.train.chunk
    if config.model.kind == "cross_encoder":
        group = 1 + batch.negatives.shape[1]
        asked = [questions[place // group] for place in order]
        parts = [tokenizer.pairs(asked[i : i + chunk], texts[i : i + chunk]) for i in range(0, len(texts), chunk)]
        places = order
    else:
        parts = [tokenizer.questions(questions[i : i + chunk]) for i in range(0, len(questions), chunk)]
        parts += [tokenizer.passages(texts[i : i + chunk]) for i in range(0, len(texts), chunk)]
        places = [*range(len(questions)), *(len(questions) + place for place in order)]
    chunks = [{name: part.to(run.device) for name, part in tokens.items()} for tokens in parts]
    return chunks, torch.tensor(places, device=run.device)


def backward(
    net: nn.Module, batch: Batch, collection: Collection, tokenizer: Tokenizer, config: Config, run: Run
) -> Contrast:
    """The loss of a batch, whose gradients are added to those of the weights."""
    chunks, places = tokenize(batch, collection, tokenizer, config, run)  # of this process's questions
    return backward_in_chunks(
        net,
        chunks,
        places,
        lambda vectors: batch_loss(vectors, batch, config),
        run.scaler.scale,
        run.autocast,
        at_once=run.world == 1 and batch.positives.size + batch.negatives.size <= config.train.one_pass,
    )


def batch_loss(vectors: Tensor, batch: Batch, config: Config) -> Contrast:
    """The loss of a batch, from the vectors or scores (W, N, D) of each process's questions, then its passages."""
    if config.model.kind == "cross_encoder":
        return list_loss(vectors.reshape(-1, 1), 1 + config.negatives.count)
    parts = shares(batch, len(vectors))
    size = len(batch.questions) // len(parts)
    questions = vectors[:, :size].reshape(-1, vectors.shape[2])  # (B, D)
    candidates = vectors[:, size:].reshape(-1, vectors.shape[2])  # (B * (1 + H), D)
    rows: list[int] = []
    right: list[int] = []
    for part in parts:
        right += range(len(rows), len(rows) + size)
        rows += passages_of(batch, part, "bi_encoder").tolist()
    own = torch.tensor(right, device=vectors.device)
    if config.loss.mask_false_negatives:
        allowed = wrong_candidates(batch.gold, rows).to(vectors.device)
    else:
        allowed = torch.ones(len(questions), len(candidates), dtype=torch.bool, device=vectors.device)
    return contrastive_loss(questions, candidates, own, allowed, config.loss)


def export(run: Run, config: Config, model: Encoder | CrossEncoder, tokenizer: Tokenizer) -> None:
    """`model.safetensors`, the weights that evaluation uses, and `encoder/` as transformers reads it."""
    facts = {
        "project": "rag",
        "step": str(run.step),
        "total_steps": str(config.train.steps),
        "config": to_yaml(config),
    }
    export_weights(run.folder / "model.safetensors", model.state_dict(), facts)

    def write(folder: object) -> None:
        quiet()
        tokenizer.inner.save_pretrained(folder)
        model.network.save_pretrained(folder)  # type: ignore[operator]

    write_folder(run.folder / ENCODER, write)


def check_fit(config: Config, collection: Collection) -> None:
    """`ProjectError` or `ConfigError` where there is nothing to train on, or less than a batch."""
    if not collection.train:
        raise ProjectError(
            f"data.dataset={config.data.dataset} has no questions to train on; evaluate a model trained on another: "
            f"python -m rag.eval --run runs/rag_squad data.dataset={config.data.dataset}"
        )
    require(
        config.train.batch_size <= len(collection.train),
        "train.batch_size",
        f"must be at most the number of training questions, {len(collection.train)}",
    )


def describe(config: Config, collection: Collection) -> None:
    """What --dry-run prints: the resolved config, then sizes and shapes."""
    check_machine(config)
    texts = [passage.whole for passage in collection.passages[:1000]]
    tokenizer = build_tokenizer(config.model, texts)
    model = build_model(config.model, len(tokenizer.inner))
    print(to_yaml(config), end="")
    kind = f"vectors of {model.dimension} numbers" if isinstance(model, Encoder) else "a score for a pair"
    print(f"# {count_parameters(model):,} parameters; {kind}")
    counts = ", ".join(f"{len(collection.questions(split)):,} to {split}" for split in ("train", "validation", "test"))
    print(f"# {len(collection.passages):,} passages; questions: {counts}")
    negatives = config.negatives.count
    epochs = config.train.steps * config.train.batch_size / len(collection.train)
    print(
        f"# a batch is {config.train.batch_size} questions, each with its passage and {negatives} hard negatives, "
        f"tokens ({config.train.batch_size}, up to {config.model.query_length}) and "
        f"({config.train.batch_size * (1 + negatives)}, up to {config.model.passage_length}); {epochs:.1f} epochs"
    )


if __name__ == "__main__":
    train(CONFIG, OPTIONS)
