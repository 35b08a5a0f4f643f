"""Tiny language models with random weights and a vocabulary of their own, made here in a moment."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import torch

TEXT = [
    "Passages:\n[1] Denver Broncos. The Denver Broncos won the game in 2016.\nQuestion: Who won?\nAnswer: Denver [1]\n",
    "Answer each question with a few words taken from the passages, and name the passage, such as [1].",
    "The river Aln flows through the town of Brel, where Mira Tolle was born in 1871 and worked as a glazier.",
    "unknown unknown system user assistant What is the capital? Where does it stand? When was she born?",
]
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIAL = ["<pad>", "<|im_start|>", "<|im_end|>", "<file_sep>"]


@cache
def tokenizer():
    """Byte-level merges, with the special tokens of a chat model."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    plain = Tokenizer(models.BPE())
    plain.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    plain.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=420, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    plain.train_from_iterator(TEXT * 3, trainer)
    made = PreTrainedTokenizerFast(
        tokenizer_object=plain,
        pad_token="<pad>",
        eos_token="<|im_end|>",
        bos_token="<|im_start|>",
        additional_special_tokens=["<file_sep>"],
    )
    made.chat_template = TEMPLATE
    return made


def llama(seed: int = 0, layers: int = 2):
    """A Llama with grouped keys."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    shape = LlamaConfig(
        vocab_size=len(tokenizer()),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        eos_token_id=2,
        pad_token_id=0,
        bos_token_id=1,
    )
    model = LlamaForCausalLM(shape).eval()
    with torch.no_grad():  # random weights of their usual size say the same whatever they read
        for weight in model.parameters():
            if weight.ndim == 2:
                weight.mul_(4)
        model.lm_head.weight.mul_(5)  # so that it can be sure of something
    return model


def gpt2(seed: int = 0):
    """A GPT-2, whose positions are learned."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(seed)
    shape = GPT2Config(
        vocab_size=len(tokenizer()), n_embd=32, n_layer=2, n_head=2, n_positions=1024, eos_token_id=2, bos_token_id=1
    )
    model = GPT2LMHeadModel(shape).eval()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim == 2:
                weight.mul_(6)
    return model


def t5(seed: int = 0):
    """A T5."""
    from transformers import T5Config, T5ForConditionalGeneration

    torch.manual_seed(seed)
    shape = T5Config(
        vocab_size=len(tokenizer()),
        d_model=32,
        d_kv=8,
        d_ff=64,
        num_layers=2,
        num_heads=4,
        eos_token_id=2,
        pad_token_id=0,
        decoder_start_token_id=0,
    )
    model = T5ForConditionalGeneration(shape).eval()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim == 2:
                weight.mul_(3)
    return model


def save(folder: Path, model=None) -> Path:
    """A model and the tokenizer in a folder, as the Hub has them."""
    folder.mkdir(parents=True, exist_ok=True)
    (llama() if model is None else model).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder
