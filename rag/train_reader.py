"""Finetune a reader on passages with distractors, so that it learns to find, to name its source, and to abstain:

    python -m rag.train_reader --config configs/rag_squad.yaml [key=value ...] [--resume] [--dry-run]

The run goes into the folder `reader` of the config's run; its settings are the sections reader and reader_train.
"""

# The config is read before PyTorch is imported, so that a typo is reported in a blink.
from common.config import Options, load, to_yaml
from rag.config import Config

if __name__ == "__main__":
    CONFIG, OPTIONS = load(Config, "rag", program="train_reader")

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from common.blocks import compile_blocks
from common.config import ConfigError, require
from common.errors import exits_cleanly
from common.rates import learning_rate
from common.run import Run
from common.runtime import check_machine, count_parameters, mix_seed
from rag.data import Collection, Passage, Question, load_collection
from rag.data.corpus import drawn
from rag.metrics.scores import exact_match, f1
from rag.negatives import build_bm25
from rag.reader.examples import Contexts
from rag.reader.extractive import SpanTask
from rag.reader.pipeline import open_retriever
from rag.reader.finetune import Batches, LanguageModelTask, Task, trained
from rag.reader.reader import Reader
from rag.reader.weights import FOLDER, adapter_of
from rag.search.retriever import Retriever

VALIDATION_STREAM = 7_400_021


@exits_cleanly
def train(config: Config, options: Options) -> None:
    """Train a reader, from its config to its last checkpoint and what it has learned."""
    check(config)
    collection = load_collection(config.data, config.data_root)
    contexts = Contexts(collection, open_search(config, collection, options.dry_run), config)
    config = replace(config, run_dir=str(Path(config.run_dir) / FOLDER))
    settings = config.reader_train
    if options.dry_run:
        return describe(config, contexts)
    with Run.start(config, options) as run:
        task = build_task(config, run, collection)
        optimizer = torch.optim.AdamW(trained(task.model), lr=settings.lr, weight_decay=settings.weight_decay)
        parts: dict[str, Any] = {"model": task.learned, "optimizer": optimizer}
        done = run.resume(**parts)  # 0 when fresh
        if config.compile:
            compile_blocks(task.model)
        net = run.prepare(task.model.train(), compiled=True)
        batches = Batches(task, contexts, config)
        size = sum(parameter.numel() for parameter in trained(task.model))
        run.display.say(
            f"{len(contexts)} contexts, {size:,} of {count_parameters(task.model):,} parameters are trained"
        )

        for step in run.steps(done, settings.steps):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, settings)
            batch = batches.at(step)

            optimizer.zero_grad(set_to_none=True)
            with run.autocast():
                loss = task.loss(net, batch)
            run.scaler.scale(loss).backward()
            grad_norm = run.check_gradients(optimizer, loss, settings.grad_clip)
            run.scaler.step(optimizer)  # in fp16 left out where a gradient overflowed; else simply optimizer.step()
            run.scaler.update()

            shown = {"loss": loss.detach(), "grad_norm": grad_norm, "lr": optimizer.param_groups[0]["lr"]}
            if run.due(step, settings.validate_every):
                shown |= validate(task, collection, contexts, config)
            run.log(step, settings.log_every, {"contexts": batches.size}, **shown)
            if run.save_due(step, settings.save_every):
                run.save(step, **parts)
        task.export(run.folder)


def open_search(config: Config, collection: Collection, dry_run: bool = False) -> Retriever:
    """What finds passages that look alike: words alone, or the search of the run that the reader will belong to. (A dry
    run, which encodes nothing, shows what words find.)
    """
    if config.reader_train.others == "words" or dry_run:
        words = replace(config.search, mode="bm25")
        return Retriever(collection.passages, words, build_bm25(collection, config))
    if not (Path(config.run_dir) / "checkpoints").is_dir():
        raise ConfigError(
            "reader_train.others", f"search needs a trained one: run rag.train with run_dir={config.run_dir}"
        )
    with Run(config, Options("eval")) as run:
        return open_retriever(config, Options("eval"), run, collection)


def build_task(config: Config, run: Run, collection: Collection) -> Task[Any, Any]:
    """What reader.kind says is trained."""
    if config.reader.kind == "extractive":
        return SpanTask(config, run, collection)
    return LanguageModelTask(config, run)


def check(config: Config) -> None:
    """`ConfigError` for what can never work."""
    require(config.reader.backend == "transformers", "reader.backend", "must be transformers for training")
    require(config.reader.neutralise, "reader.neutralise", "must be true for training")
    require(
        config.reader.kind == "generative" or config.model.kind == "bi_encoder",
        "model.kind",
        "must be bi_encoder: the extractive reader has a head of its own",
    )
    require(
        config.reader.kind == "generative" or not config.reader_train.start,
        "reader_train.start",
        "is for a language model; an extractive reader starts from model.name",
    )
    if config.reader_train.start:
        adapter_of(config.reader_train.start)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError("reader_train", "a reader is trained in one process; start it without torchrun")


def validate(task: Task[Any, Any], collection: Collection, contexts: Contexts, config: Config) -> dict[str, float]:
    """Exact match and F1 on validation questions, each with its right passages among distractors, whole."""
    questions = [question for question in collection.validation if question.answers and question.gold]
    if not questions:
        return {}
    places = drawn(config.reader_train.validation_questions, len(questions), config.seed, VALIDATION_STREAM)
    chosen = [questions[int(place)] for place in places]
    task.model.eval()
    with torch.compiler.set_stance("force_eager"):  # other shapes: not worth compiling again
        scores = score(task.reader(), chosen, [mixed(question, contexts, config) for question in chosen])
    task.model.train()
    return scores


def mixed(question: Question, contexts: Contexts, config: Config) -> list[Passage]:
    """The right passages of a question and the best others, in an order drawn by seed."""
    right, others = contexts.candidates(question)
    passages = [*right, *others][: max(config.reader_train.passages, len(right))]
    seed = mix_seed(config.seed, VALIDATION_STREAM, *question.id.encode())
    return [passages[i] for i in np.random.default_rng(seed).permutation(len(passages))]


def score(reader: Reader, questions: list[Question], passages: list[list[Passage]]) -> dict[str, float]:
    """Means over questions."""
    answers = reader.answer([question.text for question in questions], passages)
    pairs = list(zip(answers, questions, strict=True))
    return {
        "val_em": float(np.mean([exact_match(answer.text, question.answers) for answer, question in pairs])),
        "val_f1": float(np.mean([f1(answer.text, question.answers) for answer, question in pairs])),
    }


def describe(config: Config, contexts: Contexts) -> None:
    """What --dry-run prints: the resolved config, then sizes."""
    check_machine(config)
    print(to_yaml(config), end="")
    settings = config.reader_train
    per_epoch = len(contexts) // min(settings.batch_size, len(contexts))
    questions = sum(len(group) for group in contexts.groups)
    print(f"# {questions:,} training questions in {len(contexts):,} contexts, {settings.steps / per_epoch:.2f} epochs")
    first = contexts.draw(0, contexts.order(0)[0])
    print(f"# a context: {len(first.passages)} passages, {len(first.asked)} questions, such as {first.asked[:1]}")


if __name__ == "__main__":
    train(CONFIG, OPTIONS)
