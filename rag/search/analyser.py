"""From text to the terms that BM25 counts: lower case, words, no stop words, stems.

An index and its queries must be analysed alike, or nothing matches what it should: the analyser is stored with the
index, and its fingerprint tells whether another release of the stemmer or of a list of stop words has changed it.
"""

from __future__ import annotations

import hashlib
import json
import re
import unicodedata
from dataclasses import asdict

from common.config import ConfigError
from rag.config import AnalyserConfig

WORD = re.compile(r"\w+")
# the words that Lucene's English analyser leaves out: few, and none that a question could be about
FUNCTION_WORDS = (
    "a an and are as at be but by for if in into is it no not of on or such that the their then there these they this "
    "to was will with"
)
LUCENE = frozenset(FUNCTION_WORDS.split())
CACHE = 1_000_000  # spellings remembered; most text consists of few
# its terms are part of the fingerprint: words that stemmers and lists of stop words have treated differently
PROBE = (
    "The system's generously running computers were universities' happily dying skies; naïve Ångström cafés, 1,024 x²"
)


class Analyser:
    """Text to terms, as the config's analyser section says.

    Attributes:
        fingerprint: of the settings and of what this machine's libraries make of them.
    """

    def __init__(self, config: AnalyserConfig) -> None:
        self.config = config
        self._stop = stop_words(config.stop_words)
        self._stem = build_stemmer(config.stemmer)
        self._terms: dict[str, str] = {}  # spelling -> term, empty for what is left out
        described = json.dumps([asdict(config), self(PROBE), sorted(self._stop)], sort_keys=True)
        self.fingerprint = hashlib.sha256(described.encode()).hexdigest()[:16]

    def __call__(self, text: str) -> list[str]:
        """The terms of a text in their order, each as often as it occurs."""
        text = unicodedata.normalize("NFKC", text).lower() if not text.isascii() else text.lower()
        known = self._terms
        found = []
        for word in WORD.findall(text):
            term = known.get(word)
            if term is None:
                term = self._learn(word)
            if term:
                found.append(term)
        return found

    def _learn(self, word: str) -> str:
        if len(self._terms) >= CACHE:
            self._terms.clear()
        kept = len(word) >= self.config.min_length and word not in self._stop
        term = self._stem(word) if kept else ""
        self._terms[word] = term
        return term


def stop_words(name: str) -> frozenset[str]:
    """A list of words too common to tell passages apart: none, lucene's 33, or scikit-learn's 318."""
    if name == "none":
        return frozenset()
    if name == "lucene":
        return LUCENE
    from sklearn.feature_extraction.text import ENGLISH_STOP_WORDS

    return frozenset(ENGLISH_STOP_WORDS)


def build_stemmer(language: str):  # type: ignore[no-untyped-def]  # str -> str
    """The Snowball stemmer of a language (Porter 2001); `none` leaves words as they are. `ConfigError` for a language
    that it does not know.
    """
    if language == "none":
        return str
    import Stemmer

    try:
        return Stemmer.Stemmer(language, 0).stemWord  # no cache of its own
    except KeyError:
        known = ", ".join(["none", *Stemmer.algorithms()])
        raise ConfigError("analyser.stemmer", f"{language!r} is no stemmer; there are {known}") from None
