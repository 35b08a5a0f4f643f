"""Ask a finetuned model:

    python -m lora.generate --run runs/lora_e2e "name: Blue Fox | food: Thai" ["another prompt" ...] [key=value ...]
    python -m lora.generate --run runs/lora_alpaca < prompts.txt         one prompt a line
    python -m lora.generate --run runs/lora_alpaca                       a conversation, in a terminal

`generate.adapter=none` asks the base, `generate.adapter=<folder or Hub id>` another adapter for the same base.
"""

# The config is read before PyTorch is imported, so that a typo is reported in a blink.
from common.config import Options, load, require
from lora.config import Config

if __name__ == "__main__":
    CONFIG, OPTIONS = load(Config, "lora", "generate", short={"out": "generate.out"}, words="prompt")

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from common.errors import ProjectError, exits_cleanly
from common.pretrained import HUB_ID
from common.run import Run
from lora.data import Example, encode_prompts, prompt_text
from lora.data.rows import lines_of_stdin, write_json_rows
from lora.data.templates import chat_text, end_of
from lora.adapters.files import CONFIG as ADAPTER_CONFIG
from lora.adapters.files import load_adapter
from lora.adapters.multi import Bank
from lora.metrics.losses import judging
from lora.model.decoding import TextStream, write_answers
from lora.tuning import Base, load_base, load_tuned

ANSWERS_STREAM = 5_000_014  # keeps the random numbers of answers apart


@exits_cleanly
def main(config: Config, options: Options) -> None:
    """Answer the prompts of the command line, or those of stdin, or talk."""
    require(not config.classifies, "data.dataset", f"{config.data.dataset} is a classifier's: lora.classify")
    prompts = list(options.words)
    if not prompts and not sys.stdin.isatty():
        prompts = lines_of_stdin("prompt")
    with Run(config, options) as run:
        base = load_asked(config, options, run)
        if not prompts:
            talk(base, config, run)
            return
        answers = answer(base, prompts, config, run)
        if config.generate.out:
            rows = [{"prompt": prompt, "answer": text} for prompt, text in zip(prompts, answers, strict=True)]
            write_json_rows(Path(config.generate.out), rows)


def load_asked(config: Config, options: Options, run: Run) -> Base:
    """The model that is to answer: the run's own, the base alone, or the base with another adapter."""
    name = config.generate.adapter
    if not name:
        return load_tuned(config, options, run)[0]
    base = load_base(config, run)
    if name != "none":
        load_adapter(base.model, find_adapter(name))
        base.model.eval().requires_grad_(False)
    return base


def find_adapter(name: str) -> Path:
    """The folder of an adapter: as given, or from the Hub or its cache. `ProjectError` where there is none."""
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder
    if HUB_ID.fullmatch(name):
        from huggingface_hub import snapshot_download

        try:
            return Path(snapshot_download(name, allow_patterns=[ADAPTER_CONFIG, "adapter_model.safetensors"]))
        except Exception as error:  # no network, no such repository: each with a class of its own
            raise ProjectError(f"no adapter {name} on the Hub: {type(error).__name__}") from None
    raise ProjectError(f"generate.adapter: there is no folder {folder}")


def answer(base: Base, prompts: Sequence[str], config: Config, run: Run) -> list[str]:
    """Answers to some prompts, printed: word by word where there is only one, else as each batch is done."""
    texts = [prompt_text(Example("", prompt, ""), config.data, base.tokenizer) for prompt in prompts]
    if len(prompts) == 1 and config.generate.beams == 1:
        return [stream(base, texts[0], config, run)]
    answers = answer_all(base, texts, config, run)
    for prompt, text in zip(prompts, answers, strict=True):
        print(f"> {prompt}\n{text}\n", flush=True)
    return answers


def answer_all(
    base: Base, texts: Sequence[str], config: Config, run: Run, bank: Bank | None = None, names: Sequence[str] = ()
) -> list[str]:
    """Answers to worded prompts, in batches of like lengths.

    Args:
        bank: adapters on this base, of which `names` says which one answers each prompt.
    """
    rows = encode_prompts(texts, base.tokenizer)
    check_room(rows, base, config)
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    answers = [""] * len(rows)
    size = config.generate.batch_size
    with judging(base.model, run):
        for start in run.track(range(0, len(order), size)):
            chosen = order[start : start + size]
            seed = run.generator(ANSWERS_STREAM, start).initial_seed()
            prompts = [rows[i] for i in chosen]
            if bank is None:
                written = write_answers(base.model, prompts, config.generate, ends_of(base), seed)
            else:
                with bank.use([names[i] for i in chosen]):
                    written = write_answers(
                        base.model, prompts, config.generate, ends_of(base), seed, follow=bank.follow
                    )
            for i, tokens in zip(chosen, written, strict=True):
                answers[i] = base.tokenizer.decode(tokens, skip_special_tokens=True).strip()
    return answers


def stream(base: Base, text: str, config: Config, run: Run, number: int = 0) -> str:
    """One answer, printed as it is written."""
    rows = encode_prompts([text], base.tokenizer)
    check_room(rows, base, config)
    words = TextStream(base.tokenizer)

    def show(row: int, token: int) -> None:
        print(words.add(token), end="", flush=True)

    seed = run.generator(ANSWERS_STREAM, number).initial_seed()
    with judging(base.model, run):
        tokens = write_answers(base.model, rows, config.generate, ends_of(base), seed, show)[0]
    whole: str = base.tokenizer.decode(tokens, skip_special_tokens=True)
    print(whole[len(words.shown) :] if whole.startswith(words.shown) else "", flush=True)
    return whole.strip()


def talk(base: Base, config: Config, run: Run) -> None:
    """A conversation; with the chat template the model reads all of it each time, else each line is a prompt."""
    print("Ask; an empty line, Ctrl-D or Ctrl-C ends it.")
    messages: list[dict[str, str]] = []
    for number in range(1_000_000):
        try:
            line = input("> ")
        except (EOFError, KeyboardInterrupt):
            return
        if not line.strip():
            return
        messages.append({"role": "user", "content": line})
        text = prompt_text(Example("", line, ""), config.data, base.tokenizer)
        if config.data.template == "chat":
            text = chat_text(messages, config.data.system, base.tokenizer)
        messages.append({"role": "assistant", "content": stream(base, text, config, run, number)})


def ends_of(base: Base) -> set[int]:
    """Tokens after which an answer is finished: the tokenizer's, and those that the model itself names."""
    named: Any = getattr(getattr(base.model, "generation_config", None), "eos_token_id", None)
    others = named if isinstance(named, list) else [named]
    return {end_of(base.tokenizer), *(token for token in others if token is not None)}


def check_room(rows: Sequence[Sequence[int]], base: Base, config: Config) -> None:
    """`ProjectError` where a prompt and its answer would not fit into the model's context, or a prompt is empty."""
    context = getattr(getattr(base.model, "shape", None), "context", None)
    context = context or getattr(getattr(base.model, "config", None), "max_position_embeddings", None)
    longest = max(map(len, rows))
    if min(map(len, rows)) == 0:
        raise ProjectError("a prompt is empty, and this model has no token that begins a text")
    if context and longest + config.generate.max_tokens > context:
        raise ProjectError(
            f"a prompt of {longest} tokens and generate.max_tokens={config.generate.max_tokens} are more than the "
            f"{context} that this model can read"
        )


if __name__ == "__main__":
    main(CONFIG, OPTIONS)
