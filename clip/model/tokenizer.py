"""Text to token ids: CLIP's byte-level BPE from its vocabulary file, and a list of words for the drawn scenes.

Byte-pair encoding (Sennrich et al. 2016, arXiv:1508.07909) starts from single bytes and merges the most frequent pair
of neighbours first; the vocabulary file lists the merges in that order. Since every text is made of bytes, none is out
of vocabulary (Radford et al. 2019, GPT-2). The merging itself is done by the library `tokenizers`; what is CLIP's own,
the cleaning, the splitting into words and the numbering, is here and equal to OpenAI's code, id by id.

    " Two  DOGS&amp;a cat "  --clean-->  "two dogs&a cat"  --split-->  two | dogs | & | a | cat  --merge-->  ids
"""

from __future__ import annotations

import gzip
import html
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from common.errors import ProjectError

NUM_MERGES = 49_152 - 256 - 2  # the file lists more; CLIP's vocabulary ends here
END_OF_WORD = "</w>"  # "an" as a word and "an" within one are different tokens
# Contractions, runs of letters, single digits, runs of anything else that is no space. OpenAI's search ignores case,
# which after lower-casing matters for two characters only: the long s is an s, and U+0345, the iota below a Greek
# vowel, is found by no part.
WORD = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}\x{0345}]+"
WHERE = "https://github.com/openai/CLIP/raw/main/clip/bpe_simple_vocab_16e6.txt.gz"
PLAIN = re.compile(r"[ -%'-~]*")  # printable ASCII without the ampersand: no mojibake, no HTML entity


class Tokenizer:
    """What both tokenizers do alike: start of text, ids, end of text, padding.

    `vocab_size`: number of ids. The last one is the end of text, the one before it the start; 0 pads.
    `num_cut`: texts so far that were too long and lost their end.
    """

    def __init__(self, vocab_size: int, context: int):
        if context < 2:
            raise ValueError(f"a context of {context} has no room for start and end of text; take at least 2")
        self.vocab_size = vocab_size
        self.context = context
        self.start_id = vocab_size - 2
        self.end_id = vocab_size - 1
        self.num_cut = 0

    def words(self, texts: list[str]) -> list[list[int]]:
        """The ids of each text, without start and end."""
        raise NotImplementedError

    def __call__(self, texts: Iterable[str]) -> Tensor:
        """Texts -> int64 (B, context): start, ids, end, zeros. A text too long is cut, and still ends with the end of
        text; `num_cut` counts it.
        """
        texts = list(texts)
        rows = torch.zeros(len(texts), self.context, dtype=torch.int64)
        for row, ids in zip(rows, self.words(texts), strict=True):
            room = self.context - 2
            if len(ids) > room:
                self.num_cut += 1
            line = [self.start_id, *ids[:room], self.end_id]
            row[: len(line)] = torch.tensor(line)
        return rows


def trim(ids: Tensor, end_id: int) -> Tensor:
    """(B, context) -> (B, T): without the columns in which every text has ended. A causal tower returns the same for a
    part of the work. Call it on the CPU: on a GPU it would wait for the device.
    """
    ends = (ids == end_id).int().argmax(dim=1)  # (B,)
    return ids[:, : int(ends.max()) + 1]


# -- CLIP's own --------------------------------------------------------------------------------------------------------


class ClipTokenizer(Tokenizer):
    """The tokenizer of OpenAI's and OpenCLIP's models, 49,408 ids.

    path: bpe_simple_vocab_16e6.txt, or .txt.gz as it is distributed. Raises ProjectError when it is missing or is
    another file, and when `tokenizers` or `ftfy` are not installed.
    "<|endoftext|>" written in a caption is text like any other and ends nothing.
    """

    def __init__(self, path: Path, context: int = 77):
        self.merges = read_merges(path)
        letters = byte_letters()
        symbols = [*letters, *(letter + END_OF_WORD for letter in letters)]
        symbols += [first + second for first, second in self.merges]
        super().__init__(len(symbols) + 2, context)
        self.symbols = symbols
        self.bpe = _build_bpe({symbol: i for i, symbol in enumerate(symbols)}, self.merges)

    def words(self, texts: list[str]) -> list[list[int]]:
        """The ids of each text, without start and end."""
        return [encoding.ids for encoding in self.bpe.encode_batch_fast([clean(text) for text in texts])]

    def decode(self, ids: Iterable[int]) -> str:
        """The text of some ids, cleaned and with a space after each word; start, end and everything after the end are
        left out. Bytes that are no UTF-8 (a text cut within a letter) become U+FFFD.
        """
        kept = []
        for i in map(int, ids):
            if i == self.end_id:
                break
            if i != self.start_id:
                kept.append(self.symbols[i])
        code = {letter: byte for letter, byte in zip(byte_letters(), BYTES, strict=True)}
        text = "".join(kept).replace(END_OF_WORD, " ")
        raw = bytes(code[letter] if letter != " " else ord(" ") for letter in text)
        return raw.decode("utf-8", errors="replace").strip()


# Bytes in the order of CLIP's ids: first those that are printable letters of Latin-1, then the others.
PRINTABLE = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
BYTES = [*PRINTABLE, *(byte for byte in range(256) if byte not in set(PRINTABLE))]


def byte_letters() -> list[str]:
    """A visible letter for each of `BYTES` (Radford et al. 2019): merges can then be written as lines of text."""
    others = range(256, 256 + 256 - len(PRINTABLE))
    return [chr(code) for code in [*PRINTABLE, *others]]


def clean(text: str) -> str:
    """As OpenAI's code: repair of wrongly decoded Unicode (ftfy), HTML entities twice, single spaces, lower case.

    Captions of the web hold `&amp;amp;` and `Ã©`; repaired, they share the ids of the other captions.
    """
    if not PLAIN.fullmatch(text):  # nothing to repair in plain ASCII, and most captions are
        text = html.unescape(html.unescape(_ftfy().fix_text(text)))
    return " ".join(text.split()).lower()


def read_merges(path: Path) -> list[tuple[str, str]]:
    """The pairs to merge, first things first. `ProjectError` for a file that is missing or no vocabulary of CLIP."""
    try:
        data = path.read_bytes()
    except OSError:
        raise ProjectError(
            f"CLIP's vocabulary is missing at {path}; download {WHERE} there, or use data.tokenizer=words with "
            "data.dataset=scenes, which needs none"
        ) from None
    try:
        lines = (gzip.decompress(data) if path.suffix == ".gz" else data).decode("utf-8").split("\n")
        merges = [(first, second) for first, second in (line.split() for line in lines[1 : NUM_MERGES + 1])]
    except (ValueError, OSError, EOFError):
        merges = []
    if len(merges) != NUM_MERGES:
        raise ProjectError(f"{path} is not CLIP's vocabulary, a header and then a pair of tokens a line; see {WHERE}")
    return merges


def _build_bpe(ids: dict[str, int], merges: list[tuple[str, str]]) -> Any:
    try:
        from tokenizers import Regex, Tokenizer, models, pre_tokenizers
    except ImportError:
        raise ProjectError("CLIP's tokenizer needs the library tokenizers: pip install tokenizers") from None
    bpe = Tokenizer(models.BPE(vocab=ids, merges=merges, end_of_word_suffix=END_OF_WORD))
    split = pre_tokenizers.Split(Regex(WORD), behavior="removed", invert=True)
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    return bpe


def _ftfy() -> Any:
    try:
        import ftfy
    except ImportError:
        raise ProjectError("CLIP's tokenizer repairs Unicode with ftfy: pip install ftfy") from None
    return ftfy


# -- a closed vocabulary -----------------------------------------------------------------------------------------------


class WordTokenizer(Tokenizer):
    """One id a word of a known list; for captions that a program writes, such as those of the scenes.

    Id 0 pads, 1 is any word that is not in the list, then come the words in the order given, start and end.
    """

    UNKNOWN = 1

    def __init__(self, words: Iterable[str], context: int):
        self.list = list(words)
        self.ids = {word: i for i, word in enumerate(self.list, start=2)}
        super().__init__(len(self.list) + 4, context)

    def words(self, texts: list[str]) -> list[list[int]]:
        """The ids of each text, without start and end."""
        return [[self.ids.get(word, self.UNKNOWN) for word in split_words(text)] for text in texts]


def split_words(text: str) -> list[str]:
    """Lower-case runs of letters and digits."""
    return re.findall(r"\w+", text.lower())
