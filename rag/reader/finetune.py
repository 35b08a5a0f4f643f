"""What `rag.train_reader` trains: a language model through low-rank updates, or an encoder that marks answers.

Both learn from the same contexts (rag/reader/examples.py); this is where a context becomes a batch of each, and where
what was learned is written down.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from common.config import ConfigError
from common.errors import ProjectError, first_line
from common.run import Run
from common.runtime import mix_seed
from rag.config import Config
from rag.load import write_folder
from rag.reader.examples import Context, Contexts
from rag.reader.prompt import Prompter
from rag.reader.reader import Reader
from rag.reader.tree import Tree, TreeBatch, collate, grow, tree_loss
from rag.reader.weights import ADAPTER, build_reader, citing, load_base, longest_of, quiet_peft, read_adapter

WINDOW = 16  # batches whose contexts are sorted by length together
BATCH_STREAM = 7_400_011
ROW = TypeVar("ROW")
BATCH = TypeVar("BATCH")


class Task(Protocol[ROW, BATCH]):
    """A reader in training.

    Attributes:
        model: what is called in the loop.
        learned: what a checkpoint holds of it.
    """

    model: Any
    learned: Any

    def row(self, context: Context) -> ROW | None:
        """A context as the model reads it; None where nothing can be learned from it."""
        ...

    def length(self, row: ROW) -> int:
        """Tokens of it."""
        ...

    def collate(self, rows: list[ROW]) -> BATCH:
        """Several at once, on the device."""
        ...

    def loss(self, net: Any, batch: BATCH) -> Tensor:
        """What is minimised: a scalar."""
        ...

    def reader(self) -> Reader:
        """A reader with the present weights."""
        ...

    def export(self, folder: Path) -> None:
        """Write what was learned."""
        ...


class Batches(Generic[ROW, BATCH]):
    """The batch of each step: contexts in an order drawn anew for each epoch, those of similar length together."""

    def __init__(self, task: Task[ROW, BATCH], contexts: Contexts, config: Config) -> None:
        self.task = task
        self.contexts = contexts
        self.seed = config.seed
        self.size = min(config.reader_train.batch_size, len(contexts))
        self.per_epoch = len(contexts) // self.size
        self._window: tuple[int, int] = (-1, -1)
        self._rows: list[list[ROW]] = []

    def at(self, step: int) -> BATCH:
        """The batch of step 1, 2, ..."""
        epoch, place = divmod(step - 1, self.per_epoch)
        window, place = divmod(place, WINDOW)
        if self._window != (epoch, window):
            self._rows = self.plan(epoch, window)
            self._window = (epoch, window)
        return self.task.collate(self._rows[place])

    def plan(self, epoch: int, window: int) -> list[list[ROW]]:
        """The batches of a window, in the order in which they come."""
        first = window * WINDOW
        count = min(WINDOW, self.per_epoch - first)
        chosen = self.contexts.order(epoch)[first * self.size : (first + count) * self.size]
        found = (self.task.row(self.contexts.draw(epoch, index)) for index in chosen)
        rows = sorted((row for row in found if row is not None), key=self.task.length)
        if len(rows) < count:
            raise ProjectError(
                f"only {len(rows)} of {len(chosen)} contexts can be learned from: their answers do not stand in their "
                "passages; look at the data, or raise reader_train.window"
            )
        order = np.random.default_rng(mix_seed(self.seed, BATCH_STREAM, epoch, window)).permutation(count)
        cuts = np.linspace(0, len(rows), count + 1).astype(int)
        return [rows[cuts[i] : cuts[i + 1]] for i in order]


class Adapter:
    """The trained part of a model under peft, as a checkpoint's part: some megabytes."""

    def __init__(self, model: Any) -> None:
        self.model = model

    def state_dict(self) -> dict[str, Tensor]:
        """The low-rank matrices."""
        from peft import get_peft_model_state_dict

        return get_peft_model_state_dict(self.model)

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """The inverse. `ValueError` for matrices of another model."""
        from peft import set_peft_model_state_dict

        result: Any = set_peft_model_state_dict(self.model, state)
        own = self.state_dict()
        if result.unexpected_keys or set(own) != set(state):
            raise ValueError("the adapter is of another model")


class LanguageModelTask:
    """Low-rank updates of a decoder-only model, learned from answers alone (Hu et al. 2022).

    Args:
        run: for the device, and for the precision of the frozen weights.
    """

    def __init__(self, config: Config, run: Run) -> None:
        with quiet_peft():
            from peft import LoraConfig, get_peft_model

        half = run.machine.amp_dtype == torch.bfloat16
        base, self.tokenizer = load_base(config.reader.model, torch.bfloat16 if half else torch.get_default_dtype())
        if base.config.is_encoder_decoder:
            raise ConfigError("reader.model", f"{config.reader.model} is an encoder-decoder; name a decoder-only model")
        settings = LoraConfig(
            task_type="CAUSAL_LM",
            r=config.reader_train.rank,
            lora_alpha=config.reader_train.alpha,  # type: ignore[arg-type]  # used as a number
            lora_dropout=config.reader_train.dropout,
            target_modules="all-linear",
        )
        try:
            with quiet_peft():
                self.model = get_peft_model(base, settings)
        except ValueError as error:
            raise ProjectError(f"{config.reader.model} cannot be adapted: {first_line(error)}") from None
        self.model.to(run.device)
        self.config = citing(config.reader, finetuned=True)
        self.device = run.device
        self.track = run.track
        self.learned = Adapter(self.model)
        if config.reader_train.start:
            self.go_on_from(config.reader_train.start)
        self.prompter = Prompter(self.tokenizer, self.config, longest_of(base.config))
        self.pad = self.tokenizer.pad_token_id or 0

    def go_on_from(self, start: str) -> None:
        """Take another finetuned reader's matrices. `ConfigError` if they have other shapes."""
        try:
            self.learned.load_state_dict(read_adapter(start))
        except (ValueError, RuntimeError):
            raise ConfigError(
                "reader_train.start", f"the reader in {start} is of another model or has another reader_train.rank"
            ) from None

    def row(self, context: Context) -> Tree | None:
        """See `Task`. An answer that the passages do not give is the abstention word."""
        if not context.asked:
            return None
        prompts = [self.prompter.build(asked.question, context.passages) for asked in context.asked]
        answers = []
        for asked, prompt in zip(context.asked, prompts):
            right = [context.passages[place] for place in asked.sources]
            # their numbers as shown; one that did not fit into the prompt is not cited
            sources = [prompt.passages.index(passage) for passage in right if passage in prompt.passages]
            answers.append(self.prompter.answer_ids(asked.answer or self.config.abstain, sources))
        return grow([self.prompter.prefix + prompt.ids for prompt in prompts], answers)

    def length(self, row: Tree) -> int:
        """See `Task`."""
        return len(row.ids)

    def collate(self, rows: list[Tree]) -> TreeBatch:
        """See `Task`."""
        return collate(rows, self.pad, self.device)

    def loss(self, net: Any, batch: TreeBatch) -> Tensor:
        """See `Task`."""
        return tree_loss(net, self.model.get_output_embeddings(), batch)

    def reader(self) -> Reader:
        """See `Task`."""
        return build_reader(self.config, self.model.get_base_model(), self.tokenizer, track=self.track)

    def export(self, folder: Path) -> None:
        """`adapter/` in peft's format: whole, or as it was."""
        # where the model was found on this machine says nothing to another
        self.model.peft_config["default"].base_model_name_or_path = self.config.model
        write_folder(folder / ADAPTER, lambda path: self.model.save_pretrained(str(path), save_embedding_layers=False))


def trained(model: nn.Module) -> Iterator[nn.Parameter]:
    """The parameters that training changes."""
    return (parameter for parameter in model.parameters() if parameter.requires_grad)
