"""Ask questions and see where the answers stand:

    python -m rag.ask --run runs/rag_squad "Which NFL team won Super Bowl 50?"
    python -m rag.ask --run runs/notes                 # your own documents, after rag.index; one question a line
    python -m rag.ask --run runs/notes --json "..."    # for programs

An answer is withheld where the reader's confidence is below the threshold that `rag.answer` has set.
"""

# The config is read before PyTorch is imported, so that a typo is reported in a blink.
import re
import sys

from common.config import Options, load
from rag.config import Config

SETTING = re.compile(r"[a-z_]+(\.[a-z_0-9]+)*=")
WITH_VALUE = ("--run", "--checkpoint", "--question")


def as_settings(words: list[str]) -> list[str]:
    """The command line with its plain words as the setting ask.question, and --json as ask.json=true."""
    settings: list[str] = []
    question: list[str] = []
    for i, word in enumerate(words):
        if word == "--json":
            settings.append("ask.json=true")
        elif word.startswith("-") or SETTING.match(word) or (i > 0 and words[i - 1] in WITH_VALUE):
            settings.append(word)
        else:
            question.append(word)
    return [*settings, f"ask.question={' '.join(question)}"] if question else settings


if __name__ == "__main__":
    CONFIG, OPTIONS = load(Config, "rag", "ask", as_settings(sys.argv[1:]), short={"question": "ask.question"})

import json
from collections.abc import Iterable, Iterator

from rich.console import Console
from rich.text import Text

from common.errors import ProjectError, exits_cleanly
from common.run import Run
from rag.reader.neutralise import strip_unseen
from rag.reader.pipeline import Pipeline, Reply, marked, open_pipeline

EXCERPT = 240  # characters of a source that are shown
PROMPT = "? "


@exits_cleanly
def main(config: Config, options: Options) -> None:
    """Answer one question, or one after another until the input ends."""
    with Run(config, options) as run:
        pipeline = open_pipeline(config, options, run)
        console = Console(highlight=False, soft_wrap=True)
        questions: Iterable[str] = [config.ask.question] if config.ask.question else lines(console, config.ask.json)
        for question in questions:
            try:
                if config.ask.json:
                    print(json.dumps(pipeline.ask(question).as_json(), ensure_ascii=False), flush=True)
                else:
                    show(pipeline, question, console)
            except ProjectError as error:
                if config.ask.question:
                    raise
                print(f"error: {error}", file=sys.stderr)  # the next question may be a better one


def lines(console: Console, plain: bool) -> Iterator[str]:
    """Questions that a person types or a file holds, one a line; empty ones are passed over."""
    if sys.stdin.isatty() and not plain:
        console.print("One question a line; an empty line or Ctrl-D ends.", style="dim")
    while True:
        try:
            line = input(PROMPT if sys.stdin.isatty() and not plain else "").strip()
        except (EOFError, KeyboardInterrupt):
            return
        if line:
            yield line
        elif sys.stdin.isatty():
            return


def show(pipeline: Pipeline, question: str, console: Console) -> None:
    """Print an answer as it is written, then its sources."""
    for part in pipeline.stream(question):
        if isinstance(part, Reply):
            console.print()
            print_sources(part, console)
        else:
            console.print(Text(strip_unseen(part), style="bold"), end="")
            console.file.flush()


def print_sources(reply: Reply, console: Console) -> None:
    """The passages that were read, those cited with the answer's words marked; then how sure and how long."""
    if reply.withheld:
        console.print("The passages do not seem to say; take the words above for a guess.", style="yellow")
    for place, passage in enumerate(reply.answer.passages):
        cited = place in reply.answer.cited
        console.print(Text(f"[{place + 1}] {strip_unseen(passage.title or passage.id)}", style="" if cited else "dim"))
        if cited:
            console.print(excerpt(strip_unseen(passage.text), reply.answer.text))
    milliseconds = sum(reply.seconds.values()) * 1000
    console.print(f"confidence {reply.answer.confidence:.2f}, {milliseconds:.0f} ms", style="dim")


def excerpt(text: str, answer: str) -> Text:
    """A part of a passage around the first place that has the answer's words, which are marked."""
    pieces = marked(text, answer)
    first = len(pieces[0][0]) if len(pieces) > 1 and not pieces[0][1] else 0
    start = max(0, first - EXCERPT // 2)
    end = start + EXCERPT
    shown = Text("    " + ("..." if start else ""))
    at = 0
    for piece, mark in pieces:
        part = piece[max(0, start - at) : max(0, end - at)]
        shown.append(part, style="reverse" if mark else "")
        at += len(piece)
    return shown.append("..." if end < len(text) else "")


if __name__ == "__main__":
    main(CONFIG, OPTIONS)
