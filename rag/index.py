"""Make a folder of your own documents searchable, and keep it so:

    python -m rag.index --corpus ~/notes [run_dir=runs/notes model.name=runs/rag_squad/encoder ...]
    python -m rag.index --run runs/notes                     # again later: only what has changed is read
    python -m rag.index --run runs/notes --ask "..."         # the passages that answer a question best

Reads txt, md, html, pdf and docx files; what cannot be read is named. Writes `config.yaml` and `index/` into the run
folder. Nothing leaves this machine.
"""

# The config is read before PyTorch is imported, so that a typo is reported in a blink.
from common.config import Options, load, to_yaml
from rag.config import Config

if __name__ == "__main__":
    CONFIG, OPTIONS = load(Config, "rag", "index", short={"corpus": "data.folder", "ask": "index.ask"})

import shlex
import time
from dataclasses import replace
from pathlib import Path

from rich.console import Console
from rich.text import Text

from common.config import require
from common.errors import exits_cleanly
from common.files import write_text
from common.lock import FolderLock
from common.run import Run
from common.runtime import check_machine
from rag.config import SCRATCH
from rag.data.documents import check_folder, count_kinds
from rag.data.corpus import named
from rag.load import load_reranker, load_untrained
from rag.model.encoder import fingerprint
from rag.search.embed import Embedder
from rag.search.library import Library, Update

EXCERPT = 300  # characters of a passage that are shown


@exits_cleanly
def main(config: Config, options: Options) -> None:
    """Index a folder, or bring its index up to date; then answer `index.ask`, if there is one, with passages."""
    started = time.perf_counter()
    config = settle(config)
    check_machine(config)
    with Run(config, options) as run:
        lock = FolderLock(run.folder, run.display.say)
        try:
            library = open_library(config, run)
            done = library.update(Path(config.data.folder))
            write_text(run.folder / "config.yaml", to_yaml(config))
        finally:
            lock.release()
        report(done, run, time.perf_counter() - started)
        if config.index.ask:
            answer(library, config, run)


def settle(config: Config) -> Config:
    """The config with the dataset and the folders that go without saying. `ConfigError` where no folder is named,
    `ProjectError` where there is none of that name.
    """
    require(config.data.folder, "data.folder", "name the folder of documents: python -m rag.index --corpus <folder>")
    require(config.model.name != SCRATCH, "model.name", "must name a trained encoder, such as runs/rag_squad/encoder")
    require(config.model.kind == "bi_encoder", "model.kind", "must be bi_encoder: documents are found by their vectors")
    folder = Path(config.data.folder).expanduser().resolve()
    check_folder(folder)  # before an encoder is loaded for nothing
    data = replace(config.data, dataset="folder", folder=str(folder))
    return replace(config, data=data, run_dir=config.run_dir or f"runs/{folder.name or 'documents'}")


def open_library(config: Config, run: Run) -> Library:
    """The index of a run folder with the encoder that the config names."""
    model, tokenizer = load_untrained(config.model, run.device)
    embedder = Embedder(model, tokenizer, run.autocast, config.eval.batch_size, run.track)
    encoder = fingerprint(model, config.model)
    return Library(run.folder / "index", config, embedder, encoder, run.display.say)


def report(done: Update, run: Run, seconds: float) -> None:
    """What was done, for a person."""
    for note in done.notes:
        run.display.say(note)
    counts = [
        f"{len(names)} {what} ({count_kinds(iter(names))}: {named(names)})"
        for what, names in (("new", done.added), ("changed", done.changed), ("deleted", done.deleted))
        if names
    ]
    run.display.say(f"{'; '.join(counts) or 'nothing has changed'}; {done.passages} passages, {seconds:.1f} s")
    folder = shlex.quote(str(run.folder))
    run.display.say(f"search it: python -m rag.index --run {folder} --ask '...'")
    run.display.say(f"ask it:    python -m rag.ask --run {folder}")


def answer(library: Library, config: Config, run: Run) -> None:
    """Print the best passages for a question, with where they stand."""
    retriever = library.retriever(load_reranker(config, run))
    console = Console(highlight=False)
    for number, hit in enumerate(retriever.search([config.index.ask])[0], start=1):
        console.print(Text(f"{number}. {hit.passage.id}: {hit.passage.title}", style="bold"))
        excerpt = hit.passage.text[:EXCERPT]
        console.print(Text(excerpt + ("..." if len(hit.passage.text) > EXCERPT else "")))


if __name__ == "__main__":
    main(CONFIG, OPTIONS)
