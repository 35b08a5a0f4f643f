"""Examples from their files, as tokens, as rows of a batch."""

from lora.data.batches import Batch, Batches, collate, visible
from lora.data.classes import Labelled, keep_classes, load_labelled, read_classes
from lora.data.examples import Example, load_examples
from lora.data.packing import pack
from lora.data.templates import Tokens, encode, encode_prompts, encode_texts, prompt_text

__all__ = [
    "Batch",
    "Batches",
    "Example",
    "Labelled",
    "Tokens",
    "collate",
    "encode",
    "encode_prompts",
    "encode_texts",
    "keep_classes",
    "load_examples",
    "load_labelled",
    "pack",
    "prompt_text",
    "read_classes",
    "visible",
]
