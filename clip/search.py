"""Find pictures in a folder by what they show:

    python -m clip.search --run runs/lit_flickr8k --images ~/Pictures "a dog in the snow" "two people at a table"
    python -m clip.search --run runs/lit_flickr8k --images ~/Pictures --like photo.jpg

The first call embeds every image, later ones only what is new or has changed; without a query nothing is searched. What
was found is printed, and lies in `contact_sheet.html` and `.png` of `--out`. `--weights openai/ViT-B-32` takes
published weights instead of a run.

The index is one SQLite file and belongs to one folder and one model. Killed in the middle, it keeps what was embedded.
With `--index-kind hnsw` the search is approximate and fast for hundreds of thousands of images; flat is exact.
"""

# The command line is read before PyTorch is imported, so that a typo is reported in a blink.
import argparse

from clip.arguments import Parser, model_parser
from clip.arguments import parse as parse_model


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The arguments, checked."""
    parser: Parser = model_parser("search", __doc__)
    parser.add_argument("--images", required=True, help="a folder; its sub-folders are searched as well")
    parser.add_argument("--like", action="append", default=[], metavar="FILE", help="find images like this one")
    parser.add_argument("--top", type=int, default=12, help="images found for each query (default: 12)")
    parser.add_argument("--index", help="the file of embeddings (default: search/ of the run)")
    parser.add_argument(
        "--index-kind", choices=("flat", "hnsw"), default="flat", help="flat: exact; hnsw: approximate (default: flat)"
    )
    parser.add_argument("--rebuild", action="store_true", help="forget the index and embed all images anew")
    parser.add_argument("--verify", action="store_true", help="read every file, even one that seems unchanged")
    parser.add_argument("--out", help="folder of the contact sheet (default: beside the index)")
    parser.add_argument("--json", action="store_true", help="print one line of JSON instead of a list")
    parser.add_argument("queries", nargs="*", metavar="QUERY", help="what the pictures show, in words")
    args = parse_model(parser, argv)
    if args.top < 1:
        parser.error("--top must be at least 1")
    if not all(query.strip() for query in args.queries):
        parser.error("a query is empty; say in words what the pictures show")
    return args


if __name__ == "__main__":
    ARGS = parse()

import hashlib
import json
import os
import time
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from clip.gallery import index as neighbours
from clip.gallery.sheet import Answer, Hit, printable, save_sheet
from clip.gallery.store import Store
from clip.gallery.update import FAULTS, Report, update, why
from clip.load import Loaded
from clip.model.published import home_of, load_chosen, name_of
from clip.model.tokenizer import WordTokenizer, split_words
from common.errors import ProjectError, exits_cleanly
from common.images.reading import SUFFIXES, open_image
from common.logging import Display

PAGE, PICTURE = "contact_sheet.html", "contact_sheet.png"
SHOWN = 20  # broken files that are listed on the terminal; --json has all


@exits_cleanly
def main(args: argparse.Namespace) -> None:
    """Update the index, then search it."""
    started = time.perf_counter()
    display = Display(True)
    folder = find_folder(args.images)
    like = [read_query(path) for path in args.like]  # a missing file is told before anything slow begins
    loaded = load_chosen(args)
    place = Path(args.index).expanduser() if args.index else default_index(home_of(args), folder)
    out = Path(args.out).expanduser() if args.out else place.parent
    store = Store(place, loaded.weights_hash, name_of(args), folder, args.rebuild)
    try:
        skip = {(out / name).absolute() for name in (PAGE, PICTURE)}
        report = update(
            store, folder, loaded.encode_images, loaded.preprocess, args.workers, display, args.verify, skip
        )
        tell(report, folder, display)
        if not report.usable:
            kinds = ", ".join(sorted(SUFFIXES))
            raise ProjectError(f"--images: {folder} has no usable image ({kinds}); give the folder of your pictures")
        answers, seconds = answer(args, loaded, like, store, display)
    finally:
        store.close()
    result: dict[str, Any] = {
        "project": "clip",
        "model": name_of(args),
        "weights": loaded.weights_hash,
        "images": {
            "folder": printable(str(folder)),
            "usable": report.usable,
            **{name: getattr(report, name) for name in ("new", "changed", "removed", "unchanged", "embedded")},
            "broken": [{"path": printable(str(path)), "why": fault} for path, fault in report.broken],
        },
        "index": {
            "path": printable(str(place)),
            "kind": args.index_kind,
            "exact": args.index_kind == "flat",
            **seconds,
        },
        "queries": [as_json(found) for found in answers],
    }
    if answers:
        note = f"{report.usable} images, {args.index_kind} index, model {name_of(args)}; scores are cosines"
        for path, fault in save_sheet(answers, folder, out / PAGE, out / PICTURE, note):
            display.say(f"note: no thumbnail of {printable(str(path))}: {fault}")
        result["sheet"] = {"html": printable(str(out / PAGE)), "png": printable(str(out / PICTURE))}
    result["seconds"] = round(time.perf_counter() - started, 2)
    show(result, answers, args.json)


def find_folder(name: str) -> Path:
    """The folder of images, as an absolute path. `ProjectError` where there is none."""
    folder = Path(name).expanduser().absolute()
    if not folder.is_dir():
        raise ProjectError(f"--images: {folder} is not a folder; give the folder of your pictures")
    return folder


def default_index(home: Path, folder: Path) -> Path:
    """Where the index of a folder lies when nothing else is said: in the run, a folder for each folder of images."""
    digest = hashlib.sha256(os.fsencode(folder)).hexdigest()[:8]
    return home / "search" / f"{printable(folder.name) or 'root'}-{digest}" / "index.sqlite"


def read_query(name: str) -> Image.Image:
    """The image of `--like`. `ProjectError` for one that cannot be used."""
    path = Path(name).expanduser()
    try:
        return open_image(path)
    except (*FAULTS, Image.DecompressionBombError) as error:
        raise ProjectError(f"--like: {path}: {why(error)}") from None


def answer(
    args: argparse.Namespace, loaded: Loaded, like: list[Image.Image], store: Store, display: Display
) -> tuple[list[Answer], dict[str, float]]:
    """What is found for each query, and how long index and search took."""
    names = [f"“{query}”" for query in args.queries] + [f"like {printable(path)}" for path in args.like]
    if not names:
        return [], {}
    check_words(loaded, args.queries, display)
    queries = torch.cat([loaded.encode_texts(args.queries), loaded.encode_images(like)])  # (Q, E)
    start = time.perf_counter()
    index, alive = neighbours.open_index(args.index_kind, store)
    opened = time.perf_counter()
    scores, found = neighbours.search(index, queries.numpy(), args.top, alive)
    ended = time.perf_counter()
    answers = []
    for name, row, numbers in zip(names, scores.tolist(), found.tolist(), strict=True):
        hits = []
        for score, number in zip(row, numbers, strict=True):
            if number >= 0:  # the graph may lead to fewer than were asked for
                hits.append(Hit(score, tuple(os.fsdecode(path) for path in store.paths(number))))
        answers.append(Answer(name, tuple(hits)))
    return answers, {
        "seconds_to_open": round(opened - start, 3),
        "ms_per_query": round(1000 * (ended - opened) / len(names), 3),
    }


def check_words(loaded: Loaded, texts: list[str], display: Display) -> None:
    """Say what the model does not know of a query."""
    before = loaded.tokenizer.num_cut
    loaded.tokenizer(texts)
    if loaded.tokenizer.num_cut > before:
        display.say(f"note: queries are cut to {loaded.tokenizer.context} tokens, as the model was trained")
    if isinstance(loaded.tokenizer, WordTokenizer):
        words = dict.fromkeys(word for text in texts for word in split_words(text))
        if unknown := [word for word in words if word not in loaded.tokenizer.ids]:
            display.say(f"note: the model has never seen these words: {', '.join(unknown)}")


def tell(report: Report, folder: Path, display: Display) -> None:
    """The update in a line, and the files that were no use."""
    display.say(
        f"{printable(str(folder))}: {report.usable} images ({report.new} new, {report.changed} changed, "
        f"{report.removed} removed), {report.embedded} embedded"
        + (f"; {len(report.broken)} cannot be used" if report.broken else "")
    )
    for path, fault in report.broken[:SHOWN]:
        display.say(f"skipping {printable(str(path))}: {fault}")
    if len(report.broken) > SHOWN:
        display.say(f"... and {len(report.broken) - SHOWN} more (--json lists all)")


def as_json(found: Answer) -> dict[str, Any]:
    """An answer in JSON types."""
    hits = [
        {
            "score": round(hit.score, 6),
            "path": printable(hit.paths[0]),
            "copies": [printable(path) for path in hit.paths[1:]],
        }
        for hit in found.hits
    ]
    return {"query": found.query, "results": hits}


def show(result: dict[str, Any], answers: list[Answer], as_line: bool) -> None:
    """Print what was found: one line of JSON, or a list."""
    if as_line:
        print(json.dumps(result), flush=True)
        return
    for found in answers:
        print(found.query)
        for rank, hit in enumerate(found.hits, 1):
            copies = f"  (and {len(hit.paths) - 1} more of the same content)" if len(hit.paths) > 1 else ""
            print(f"{rank:4}  {hit.score:.3f}  {printable(hit.paths[0])}{copies}")
    if answers:
        print(f"contact sheet: {result['sheet']['html']}")


if __name__ == "__main__":
    main(ARGS)
