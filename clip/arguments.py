"""The options that `clip.search`, `clip.zero_shot` and `clip.probe` share: which model, and where.

This module imports nothing heavy, so that a mistake on the command line is reported before PyTorch has loaded.
"""

from __future__ import annotations

import argparse
import sys
from typing import NoReturn

ACTIVATIONS = ("gelu", "quick_gelu", "gelu_tanh")


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line on stderr and exit status 2, as those of a config are."""

    def error(self, message: str) -> NoReturn:
        """Called by argparse."""
        print(f"error: {message}", file=sys.stderr)
        sys.exit(2)


def model_parser(program: str, description: str | None) -> Parser:
    """A parser that knows which model is meant: a run of one's own, or published weights."""
    parser = Parser(
        prog=f"python -m clip.{program}",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    model = parser.add_mutually_exclusive_group(required=True)
    model.add_argument("--run", help="a run folder, such as runs/lit_flickr8k")
    model.add_argument(
        "--weights", help="published weights instead of a run: openai/ViT-B-32, another Hub id, a file or a folder"
    )
    parser.add_argument("--checkpoint", default="", help="of the run: a file in its checkpoints/ (default: the newest)")
    parser.add_argument(
        "--activation",
        choices=ACTIVATIONS,
        help="of --weights, where no config beside them says it (OpenAI: quick_gelu)",
    )
    parser.add_argument(
        "--vocabulary", help="of --weights: CLIP's merges (default: beside the weights, else DATA_ROOT/clip_tokenizer)"
    )
    parser.add_argument("--data-root", default="", help="where datasets are (default: $DATA_ROOT, else data)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps (default: auto)")
    parser.add_argument("--workers", type=int, default=2, help="processes or threads that decode images (default: 2)")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser


def parse(parser: Parser, argv: list[str] | None) -> argparse.Namespace:
    """The arguments, checked as far as they are alike in all programs; options may stand between words."""
    args = parser.parse_intermixed_args(argv)
    if args.weights is None and (args.activation or args.vocabulary):
        parser.error("--activation and --vocabulary are for --weights; a run knows its own")
    if args.run is None and args.checkpoint:
        parser.error("--checkpoint is for --run")
    if args.workers < 0:
        parser.error("--workers must not be negative")
    return args
