"""Finetune a language model or a classifier with low-rank adapters:

    python -m lora.train --config configs/lora_e2e.yaml [key=value ...] [--resume] [--dry-run]

Ends with `adapter/` in the run folder, in PEFT's format; with train.method=full or head with `model/`, in that of the
Hub.

Legend: a step's batch has rows, a row one example or several packed ones.
"""

# The config is read before PyTorch is imported, so that a typo is reported in a blink.
from common.config import Options, load, to_yaml
from lora.config import PRETRAINED_HERE, Config

if __name__ == "__main__":
    CONFIG, OPTIONS = load(Config, "lora")

import contextlib
import sys
from typing import Any

import torch
from torch import nn

from common.blocks import compile_blocks
from common.errors import exits_cleanly
from common.rates import learning_rate
from common.run import Run
from common.runtime import check_machine
from lora.adapters.inject import parameter_groups
from lora.adapters.files import save_adapter
from lora.data import keep_classes
from lora.loss import ClassLoss, TuningLoss
from lora.model import set_checkpointing, write_folder
from lora.plan import describe_memory
from lora.pretrain import pretrain_base
from lora.tuning import (
    BASE,
    Base,
    Learned,
    average_gradients,
    build_optimizer,
    load_base,
    load_source,
    prepare,
    shard_model,
    share_of,
    without_sync,
)


@exits_cleanly
def train(config: Config, options: Options) -> None:
    """Run one experiment, from its config to its last checkpoint and the adapter's files."""
    source = load_source(config, note)
    if options.dry_run:
        return describe(config, len(source))
    run = Run.start(config, options)
    with run:
        if config.model.name == PRETRAINED_HERE:
            if not options.resume:
                run.begin()  # an earlier run goes now: with the first step, the new base would go with it
            pretrain_base(config, run, run.folder / BASE)
        base = load_base(config, run, source.classes)
        settings = prepare(base, config)
        model = base.model
        if config.train.checkpointing:
            set_checkpointing(model)
        batches = source.batches(base.tokenizer)
        run.display.say(batches.facts())
        run.display.say(learning(model))
        objective: nn.Module = TuningLoss(model, config.train.loss, config.train.loss_chunk)
        if config.classifies:
            objective = ClassLoss(model, config.model.pooling)
        sharded = config.train.sharding == "fsdp"
        if sharded:
            objective = shard_model(objective, run)
        groups = parameter_groups(model, config.train.lr, settings, config.train.weight_decay)
        optimizer = build_optimizer(groups, config.train)
        parts: dict[str, Any] = {"learned": Learned(model), "optimizer": optimizer}
        done = run.resume(**parts)  # 0 when fresh
        if source.classes:
            run.begin()
            run.in_main_process(lambda: keep_classes(run.folder, source.classes, done > 0))
        if config.compile:
            compile_blocks(model)
        # the same weights, for one process or several
        net = objective if sharded else run.prepare(objective, compiled=True)
        autocast = run.autocast if base.dtype == torch.float32 else contextlib.nullcontext  # else typed already
        model.train()

        for step in run.steps(done, config.train.steps):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, config.train) * group["ratio"]
            rows = batches.rows_of(step)  # a function of (seed, step), the same in every process
            total = batches.num_labels(rows)  # of the whole step: what its loss is a mean over
            rows = share_of(rows, run)
            size = config.train.microbatch or len(rows)

            optimizer.zero_grad(set_to_none=True)
            loss = torch.zeros((), device=run.device)
            for start in range(0, len(rows), size):
                batch = batches.collate(rows[start : start + size]).to(run.device)
                with without_sync(net, start + size < len(rows)):
                    with autocast():
                        # over the labels of the whole step, however they fall into parts: a mean of means would give
                        # those of a short part more weight. Processes are averaged, so each counts `world` times
                        part = net(batch) * (run.world / total)
                    run.scaler.scale(part).backward()
                loss += part.detach()
            if sharded:
                average_gradients([p for p in model.parameters() if p.requires_grad], run)
            grad_norm = run.check_gradients(optimizer, loss, config.train.grad_clip)
            run.scaler.step(optimizer)  # in fp16 left out where a gradient overflowed; else simply optimizer.step()
            run.scaler.update()

            shown: dict[str, Any] = {"loss": loss, "grad_norm": grad_norm, "lr": optimizer.param_groups[0]["lr"]}
            if run.due(step, config.train.validate_every):
                with torch.compiler.set_stance("force_eager"):  # other shapes: not worth compiling again
                    shown |= source.validate(model, base.tokenizer, run)
            run.log(step, config.train.log_every, batches.units(), **shown)
            if run.save_due(step, config.train.save_every):
                run.save(step, **parts)
        if run.is_main:
            if sharded:  # no process has the whole base: read it once more
                state = Learned(model).state_dict()
                base = load_base(config, run, source.classes)
                prepare(base, config)
                Learned(base.model).load_state_dict(state)
            export(config, run, base)


def note(text: str) -> None:
    """Print what a person should know where it does not mix with results."""
    print(text, file=sys.stderr, flush=True)


def learning(model: nn.Module) -> str:
    """How much of a model learns, in words."""
    learns = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    frozen = sum(parameter.numel() for parameter in model.parameters() if not parameter.requires_grad)
    return f"{learns:,} numbers learn, {learns / (learns + frozen):.2%} of all"


def export(config: Config, run: Run, base: Base) -> None:
    """What other programs load: the adapter alone, or the whole model where all of it has learned."""
    if config.classifies and config.model.pooling == "mean":
        run.display.say(
            "note: the head reads the mean of all states (model.pooling=mean), which transformers' own classes do not: "
            "lora.classify reads this run; other programs need model.pooling=model"
        )
    if config.train.method == "lora":
        name = str(base.folder) if config.model.name == PRETRAINED_HERE else config.model.name
        save_adapter(base.model, run.folder / "adapter", name, "SEQ_CLS" if config.classifies else "CAUSAL_LM")
    else:
        write_folder(run.folder / "model", base.model, base.tokenizer, base.dtype)


def describe(config: Config, num_examples: int) -> None:
    """What --dry-run prints: the resolved config, then sizes, without loading any weights."""
    check_machine(config)
    print(to_yaml(config), end="")
    print(f"# {num_examples:,} examples to learn from")
    for line in describe_memory(config):
        print(f"# {line}")


if __name__ == "__main__":
    train(CONFIG, OPTIONS)
