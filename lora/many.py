"""Several finetuned runs behind one question: a router picks the adapter that each prompt is for, and all prompts are
answered together, as one batch on one base.

    python -m lora.many --run runs/lora_e2e many.runs=[runs/lora_gsm8k,runs/lora_squad] "name: Blue Fox | food: Thai"
    python -m lora.many --run runs/lora_e2e many.runs=[runs/lora_gsm8k,runs/lora_squad] --measure 200

The router needs no training. It knows each run by the embeddings of some of its training prompts, their mean and how
they spread; a prompt that is farther from the nearest run than nearly all of that run's own validation prompts are is
nobody's, and the base answers it, in its chat template if it has one.

`--measure` routes held-out test prompts instead, says how many find their run, and writes routing.json and routing.csv
into the folder of --run.
"""

# The config is read before PyTorch is imported, so that a typo is reported in a blink.
from common.config import Options, load, require
from lora.config import Config

if __name__ == "__main__":
    SHORT = {"out": "generate.out", "measure": "many.measure"}
    CONFIG, OPTIONS = load(Config, "lora", "many", short=SHORT, words="prompt")

import json
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from common.config import UNUSABLE, ConfigError, explain, resolve
from common.errors import exits_cleanly
from common.files import place_of, write_csv, write_json
from common.pretrained import find
from common.run import Run
from common.terminal import show_metrics
from lora.adapters.multi import BASE, Bank
from lora.adapters.router import Router
from lora.data import Example, load_examples, prompt_text
from lora.data.examples import Split
from lora.data.rows import lines_of_stdin, read_text, write_json_rows
from lora.data.templates import words_of
from lora.generate import answer_all
from lora.tuning import Base, load_base
from lora.tuning.tasks import draw

BATCH = 64  # prompts that are embedded at once
ENDS = 240  # characters at either end of a long prompt that its embedding is made of: there stands what is asked
LONGEST = 160  # tokens of that at most
SHORTEST = 40  # characters of a line that is routed as unknown text


@dataclass(frozen=True)
class Member:
    """A run among the others.

    Attributes:
        name: its folder's, by which its adapter is known.
        config: its own, for its data and its template.
        adapter: the folder of its adapter.
    """

    name: str
    config: Config
    adapter: Path

    def prompts(self, split: Split, count: int) -> list[str]:
        """So many prompts of one part of its data, drawn by its seed."""
        examples = load_examples(self.config.data, self.config.data_root, split, note)
        return [words_of(example) for example in draw(examples, count, self.config.seed)]


@exits_cleanly
def main(config: Config, options: Options) -> None:
    """Answer the prompts of the command line, or those of stdin, or measure the router."""
    prompts = list(options.words)
    if config.many.measure:
        require(not prompts, "many.measure", "answers nothing: leave out the prompts, or this")
    members = find_members(config)
    if not prompts and not config.many.measure:
        prompts = lines_of_stdin("prompt")
    with Run(config, options) as run:
        router = build_router(members, load_encoder(config.many.encoder, run), config)
        if config.many.measure:
            return measure(router, members, config, run)
        base = load_base(config, run)
        bank = Bank(base.model)
        for member in members:
            bank.add(member.name, member.adapter)
        names = router.route(prompts)
        answers = answer_all(base, worded(prompts, names, members, base, config), config, run, bank, names)
    rows = [
        {"prompt": prompt, "adapter": name, "answer": text}
        for prompt, name, text in zip(prompts, names, answers, strict=True)
    ]
    for row in rows:
        print(f"> {row['prompt']}\n[{row['adapter']}] {row['answer']}\n", flush=True)
    if config.generate.out:
        write_json_rows(Path(config.generate.out), rows)


def note(text: str) -> None:
    """Print what a person should know where it does not mix with results."""
    print(text, file=sys.stderr, flush=True)


# -- the runs ----------------------------------------------------------------------------------------------------------


def find_members(config: Config) -> list[Member]:
    """The run of --run and those of many.runs. `ConfigError` where one is missing or cannot share the base."""
    members: list[Member] = []
    for folder in (Path(config.run_dir), *(Path(name).expanduser() for name in config.many.runs)):
        try:
            own = resolve(Config, folder / "config.yaml", [], str(folder))
        except UNUSABLE as error:
            raise ConfigError("many.runs", explain(error, Config, folder / "config.yaml")) from None
        require(own.train.method == "lora", "many.runs", f"{folder} has no adapter: its train.method is not lora")
        require(not own.classifies, "many.runs", f"{folder} is a classifier: it writes nothing")
        require(own.model.name == config.model.name, "many.runs", f"{folder} has another base, {own.model.name}")
        adapter = folder / "adapter"
        require(adapter.is_dir(), "many.runs", f"{folder} has no adapter/ yet: its training has not ended")
        name = folder.resolve().name
        require(name not in [BASE, *(member.name for member in members)], "many.runs", f"two runs are named {name}")
        members.append(Member(name, own, adapter))
    return members


# -- the router --------------------------------------------------------------------------------------------------------


def load_encoder(name: str, run: Run) -> Callable[[list[str]], Tensor]:
    """A sentence encoder: texts -> (N, D), the mean of the last layer's states over a text's tokens."""
    from transformers import AutoModel, AutoTokenizer

    from lora.model.load import from_transformers

    folder = find(name, run.display.say)
    model = from_transformers(AutoModel, folder, torch.float32).to(run.device).eval()
    tokenizer: Any = AutoTokenizer.from_pretrained(folder, local_files_only=True)

    @torch.no_grad()
    def encode(texts: list[str]) -> Tensor:
        parts = []
        for start in range(0, len(texts), BATCH):
            some = [
                text if len(text) <= 2 * ENDS else f"{text[:ENDS]} {text[-ENDS:]}"
                for text in texts[start : start + BATCH]
            ]
            batch = tokenizer(some, padding=True, truncation=True, max_length=LONGEST, return_tensors="pt").to(
                run.device
            )
            states = model(**batch).last_hidden_state  # (B, T, D)
            present = batch["attention_mask"][..., None].to(states.dtype)
            parts.append((states * present).sum(1) / present.sum(1))
        return torch.cat(parts)

    return encode


def build_router(members: Sequence[Member], encode: Callable[[list[str]], Tensor], config: Config) -> Router:
    """A router that knows each run by its training prompts."""
    router = Router(encode)
    for member in members:
        known = member.prompts("train", config.many.prompts)
        held_out = member.prompts("validation", config.many.held_out)
        router.add(member.name, known, held_out, config.many.keep)
    return router


def measure(router: Router, members: Sequence[Member], config: Config, run: Run) -> None:
    """Where test prompts go."""
    asked = {member.name: member.prompts("test", config.many.measure) for member in members}
    if config.many.unknown:
        path = place_of(config.many.unknown, config.data_root)
        lines = [line.strip() for line in read_text(path).splitlines() if len(line.strip()) >= SHORTEST]
        require(lines, "many.unknown", f"{path} has no line of {SHORTEST} characters or more")
        asked[BASE] = draw(lines, config.many.measure, config.seed)
    rows = []
    metrics: dict[str, float] = {}
    for name, prompts in asked.items():
        found = router.route(prompts)
        metrics[f"routed_{name}"] = found.count(name) / len(found)
        counts = Counter(found)
        rows.append({"prompts_of": name, "number": len(found), **{to: counts[to] for to in [*router.means, BASE]}})
    own = [metrics[f"routed_{member.name}"] for member in members]
    metrics = {"routing_accuracy": sum(own) / len(own), **metrics}  # every run counts the same, whatever its size
    write_csv(run.folder / "routing.csv", rows)
    result = {
        "project": "lora",
        "config": run.folder.name,
        "metrics": metrics,
        "n": {row["prompts_of"]: row["number"] for row in rows},
    }
    write_json(run.folder / "routing.json", result)
    show_metrics(metrics, f"{len(members)} adapters")
    print(json.dumps(result), flush=True)


def worded(
    prompts: Sequence[str], names: Sequence[str], members: Sequence[Member], base: Base, config: Config
) -> list[str]:
    """Prompts as each one's run words them; those that the base answers in its chat template, where it has one."""
    has_chat = bool(getattr(base.tokenizer, "chat_template", None))
    forms = {member.name: member.config.data for member in members}
    forms[BASE] = replace(config.data, template="chat" if has_chat else "plain", system="")
    return [
        prompt_text(Example("", prompt, ""), forms[name], base.tokenizer)
        for prompt, name in zip(prompts, names, strict=True)
    ]


if __name__ == "__main__":
    main(CONFIG, OPTIONS)
