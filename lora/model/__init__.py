"""The base: a language model or an encoder, by name, and the few ways in which the rest of the project calls it."""

from lora.model.calls import (
    additive,
    class_logits,
    decoder_of,
    head_of,
    hidden_states,
    keep_rows,
    new_cache,
    set_checkpointing,
    token_logits,
)
from lora.model.files import load_tokenizer, read_settings, read_shape
from lora.model.llama import Cache, Llama, LlamaShape, initialise
from lora.model.load import load_classifier, load_language_model, write_folder

__all__ = [
    "Cache",
    "Llama",
    "LlamaShape",
    "additive",
    "class_logits",
    "decoder_of",
    "head_of",
    "hidden_states",
    "initialise",
    "keep_rows",
    "load_classifier",
    "load_language_model",
    "load_tokenizer",
    "new_cache",
    "read_settings",
    "read_shape",
    "set_checkpointing",
    "token_logits",
    "write_folder",
]
