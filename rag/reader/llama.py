"""Reading with llama.cpp: quantised models in GGUF files, several times faster on a CPU where answers are written one
token at a time. Needs the package llama-cpp-python, which is compiled when it is installed.

Only the arithmetic is llama.cpp's: prompts are made, and tokens chosen, as everywhere else in this folder.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from common.config import ConfigError
from common.errors import ProjectError, first_line
from common.pretrained import FOLDERS, from_package
from rag.reader.decode import Rules, Step, first_token, next_token
from rag.reader.prompt import Example, Prompter
from rag.reader.reader import GenerativeReader, stop_rules
from rag.settings import ReaderConfig


class LlamaCpp:
    """Decoding with llama.cpp, one prompt after another; see `rag.reader.decode.Decoder`.

    Args:
        model: a `llama_cpp.Llama`.
        library: the module `llama_cpp`.
    """

    def __init__(self, model: Any, library: Any) -> None:
        self.model = model
        self.library = library
        self.seconds = {"read": 0.0, "write": 0.0}
        self._held: tuple[int, ...] = ()  # the prefix whose keys and values llama.cpp has at hand

    def greedy(self, prefix: Sequence[int], suffixes: list[list[int]], rules: Rules) -> Iterator[Step]:
        """The steps of one prompt as they are taken; of several, once all are done."""
        if len(suffixes) == 1:
            yield from self._one(prefix, suffixes[0], rules)
            return
        each = [list(self._one(prefix, suffix, rules)) for suffix in suffixes]
        for i in range(max(len(steps) for steps in each)):
            # what a row that has stopped goes on with is padding, as in a batch
            here = [steps[i] if i < len(steps) else Step(torch.tensor([rules.pad]), torch.zeros(1)) for steps in each]
            abstain = torch.cat([step.abstain for step in here if step.abstain is not None]) if i == 0 else None
            tokens = torch.cat([step.tokens for step in here])
            yield Step(tokens, torch.cat([step.log_probs for step in here]), abstain)

    def _one(self, prefix: Sequence[int], suffix: list[int], rules: Rules) -> Iterator[Step]:
        started = time.perf_counter()
        self._hold(tuple(prefix))
        step, stopped = first_token(self._forward(suffix), rules)
        self.seconds["read"] += time.perf_counter() - started
        yield step
        for _ in range(rules.longest - 1):
            started = time.perf_counter()
            if bool(stopped.all()):
                break
            step, stopped = next_token(self._forward(step.tokens.tolist()), stopped, rules)
            self.seconds["write"] += time.perf_counter() - started
            yield step

    def _hold(self, prefix: tuple[int, ...]) -> None:
        """Bring llama.cpp to the end of the prefix, reading it only if another one was there."""
        if prefix == self._held:
            self.model.n_tokens = len(prefix)  # `eval` forgets what stands behind this place
            return
        self.model.reset()
        self._held = ()
        if prefix:
            self.model.eval(list(prefix))
        self._held = prefix

    def _forward(self, ids: list[int]) -> torch.Tensor:
        """Read some more tokens; the logits behind the last, float32 (1, V)."""
        self.model.eval(ids)
        pointer = self.library.llama_get_logits_ith(self.model.ctx, -1)
        logits = np.ctypeslib.as_array(pointer, shape=(self.model.n_vocab(),))
        return torch.from_numpy(np.array(logits, np.float32)).unsqueeze(0)


def open_llama(config: ReaderConfig, examples: Sequence[Example]) -> GenerativeReader:
    """A reader on a GGUF file. `ProjectError` without the package or for a file that is no model."""
    try:
        import llama_cpp
    except ImportError:
        raise ProjectError(
            "reader.backend=llama.cpp needs a package: pip install llama-cpp-python (it is compiled, with CMake)"
        ) from None
    from transformers import AutoTokenizer

    file = find_gguf(config.model)
    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
        model = llama_cpp.Llama(str(file), n_ctx=0, verbose=False)  # 0: as many tokens as the model was trained with
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise ProjectError(f"{file} cannot be read as a model: {first_line(error)}") from None
    prompter = Prompter(tokenizer, config, model.n_ctx(), examples)
    ends = [model.token_eos()]
    rules = stop_rules(tokenizer, config, prompter.lead, tokenizer.pad_token_id or ends[0], ends)
    return GenerativeReader(config, LlamaCpp(model, llama_cpp), prompter, rules)


def find_gguf(name: str) -> Path:
    """The GGUF file that reader.model names, or that an installed package has of it; else `ConfigError`."""
    path = Path(name).expanduser()
    if path.suffix == ".gguf" and path.is_file():
        return path
    packaged = FOLDERS.get(name)
    carried = None if packaged is None else from_package(packaged)
    if carried is None or carried.suffix != ".gguf":
        raise ConfigError("reader.model", f"{name} is no .gguf file on this machine, which llama.cpp reads")
    return carried
