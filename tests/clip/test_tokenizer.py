"""CLIP's tokenizer gives the ids of OpenCLIP's, which are OpenAI's; cutting, padding, and the list of words."""

from __future__ import annotations

import gzip
import importlib.util
import json
import random
import unicodedata
from pathlib import Path

import pytest
import torch

from clip.model.tokenizer import ClipTokenizer, WordTokenizer, clean, split_words, trim
from common.errors import ProjectError
from tests.helpers import ROOT

VOCABULARY = ROOT / "data/clip_tokenizer/bpe_simple_vocab_16e6.txt"
if not VOCABULARY.is_file() and (package := importlib.util.find_spec("open_clip")):  # it brings the same file
    VOCABULARY = Path(package.origin).parent / "bpe_simple_vocab_16e6.txt.gz"
CAPTIONS = ROOT / "data/flickr8k/dataset_flickr8k.json"
needs_vocabulary = pytest.mark.skipif(not VOCABULARY.is_file(), reason=f"{VOCABULARY} is not here")
NASTY = [
    "",
    " ",
    "\n\t \r",
    "a",
    "A photo of a dog.",
    "it's DON'T we'll I'D you've they're I'm",
    "'s't'll'dd''",
    "naïve café, coöperate; Straße ÆØÅ",
    "naïve café (decomposed)",
    "Ã©tÃ© â€œquotedâ€\x9d",
    "&amp;amp; &lt;b&gt; &eacute; AT&T &#x1F600;",
    "x" * 500,
    "word " * 200,
    "1234567890 3.14 ½ ² Ⅷ １２３ ١٢٣",
    "日本語のテキスト 한국어 中文，字符。",
    "مرحبا بالعالم שלום",
    "हिन्दी ภาษาไทย",
    "🐶🐶 a dog 👩‍👩‍👧 🏳️‍🌈 🇩🇪 👍🏽",
    "İstanbul ẞ ǅ ﬁ ﬂ",
    "a\u00a0b\u200bc\u2028d\ufeff",
    "\x00\x01\x1b[31mred\x1b[0m\x7f",
    "’quoted’ “x” — – … ‽",
    "Ａｂｃ　ｄ",
    "!!!???...---___***((([[[{{{",
    "e=mc^2 \\frac{a}{b} #hashtag @user http://a.b/c?d=e&f=g",
    "CamelCaseWord snake_case kebab-case",
    "zalgo t̷̢̧̛e̸͝x̵t",
    "\ud83d",
]


@pytest.fixture(scope="module")
def tokenizer() -> ClipTokenizer:
    return ClipTokenizer(VOCABULARY)


@pytest.fixture(scope="module")
def reference():
    return pytest.importorskip("open_clip").tokenizer.SimpleTokenizer()


def random_strings(count: int) -> list[str]:
    """Letters, digits and marks from all over Unicode, as far as it was assigned in 2020."""
    rng = random.Random(0)
    blocks = [(32, 127), (32, 127), (0xA1, 0x250), (0x370, 0x530), (0x900, 0xA00), (0x4E00, 0x9FA5), (0x1F300, 0x1F650)]
    found = []
    while len(found) < count:
        text = "".join(chr(rng.randrange(*rng.choice(blocks))) for _ in range(rng.randrange(60)))
        found.append("".join(rng.choice(("", " ", "'")) + c for c in text if unicodedata.category(c) != "Cn"))
    return found


@needs_vocabulary
def test_ids_equal_the_reference(tokenizer, reference) -> None:
    texts = NASTY + random_strings(1500)
    if CAPTIONS.is_file():
        images = json.loads(CAPTIONS.read_text())["images"]
        texts += [sentence["raw"] for image in images[::20] for sentence in image["sentences"]]
    assert len(texts) > 1000 and len(set(texts)) > 1000
    for text, ids in zip(texts, tokenizer.words(texts), strict=True):
        assert ids == reference.encode(text), ascii(text)
    assert torch.equal(tokenizer(texts), reference(texts))
    assert tokenizer.vocab_size == reference.vocab_size == 49_408
    assert (tokenizer.start_id, tokenizer.end_id) == (reference.sot_token_id, reference.eot_token_id)


@needs_vocabulary
def test_every_letter(tokenizer, reference) -> None:
    """Each assigned letter, digit and mark of the first blocks, alone, within a word and after an apostrophe."""
    letters = [chr(code) for code in range(0x20, 0x3000) if unicodedata.category(chr(code)) not in ("Cn", "Cs", "Co")]
    texts = [f"a{letter}b {letter} '{letter}" for letter in letters]
    unequal = [
        ascii(text) for text, ids in zip(texts, tokenizer.words(texts), strict=True) if ids != reference.encode(text)
    ]
    assert not unequal


@needs_vocabulary
def test_plain_text_needs_no_repair(reference) -> None:
    """The short cut around ftfy is exact: on printable ASCII that has no ampersand."""
    from open_clip.tokenizer import get_clean_fn

    rng = random.Random(1)
    letters = [chr(code) for code in range(32, 127) if chr(code) != "&"]
    for _ in range(500):
        text = "".join(rng.choices(letters, k=30))
        assert clean(text) == get_clean_fn("lower")(text)


@needs_vocabulary
def test_a_long_text_is_cut_counted_and_still_ends(tokenizer) -> None:
    before = tokenizer.num_cut
    short, exact, long = tokenizer(["a dog", "dog " * 75, "dog " * 76])
    assert tokenizer.num_cut == before + 1
    for row in (short, exact, long):
        assert row[0] == tokenizer.start_id and (row == tokenizer.end_id).sum() == 1
    assert exact[-1] == long[-1] == tokenizer.end_id and torch.equal(exact, long)
    assert short.tolist()[4:] == [0] * 73


@needs_vocabulary
def test_an_end_of_text_in_a_caption_ends_nothing(tokenizer) -> None:
    (row,) = tokenizer(["a dog <|endoftext|> <end_of_text> a cat"])
    assert (row == tokenizer.end_id).sum() == 1 and (row == tokenizer.start_id).sum() == 1
    assert tokenizer.decode(row) == "a dog <| endoftext |> < end _ of _ text > a cat"


@needs_vocabulary
def test_decode_is_the_inverse(tokenizer) -> None:
    text = "two dogs , 3 кота & a 🐶 ran"
    assert tokenizer.decode(tokenizer([text])[0]) == text
    cut = tokenizer.words(["𓀀"])[0]  # a letter so rare that no merge makes one token of its bytes
    assert len(cut) > 1 and tokenizer.decode(cut) == "𓀀" and "\ufffd" in tokenizer.decode(cut[:1])


@needs_vocabulary
def test_the_packed_vocabulary_is_the_same(tokenizer, tmp_path) -> None:
    packed = tmp_path / "vocabulary.txt.gz"
    data = VOCABULARY.read_bytes()
    packed.write_bytes(data if VOCABULARY.suffix == ".gz" else gzip.compress(data))
    assert ClipTokenizer(packed).merges == tokenizer.merges


def test_a_missing_or_wrong_vocabulary_is_named(tmp_path) -> None:
    with pytest.raises(ProjectError, match=r"missing at .*none\.txt; download https://.*words"):
        ClipTokenizer(tmp_path / "none.txt")
    wrong = tmp_path / "wrong.txt"
    wrong.write_text("#version\na b\n")
    with pytest.raises(ProjectError, match=r"wrong\.txt is not CLIP's vocabulary"):
        ClipTokenizer(wrong)
    damaged = tmp_path / "damaged.txt.gz"
    damaged.write_bytes(gzip.compress(b"x" * 1000)[:20])
    with pytest.raises(ProjectError, match="not CLIP's vocabulary"):
        ClipTokenizer(damaged)


def test_words() -> None:
    tokenizer = WordTokenizer(["cat", "dog"], 5)
    assert tokenizer.vocab_size == 6
    rows = tokenizer(["Dog, cat!", "", "a cat dog dog"])
    assert rows.tolist() == [[4, 3, 2, 5, 0], [4, 5, 0, 0, 0], [4, 1, 2, 3, 5]]
    assert tokenizer.num_cut == 1
    assert trim(rows[:2], tokenizer.end_id).shape == (2, 4)
    assert tokenizer([]).shape == (0, 5)
    assert split_words("On the left: 2 Big-ish dogs") == ["on", "the", "left", "2", "big", "ish", "dogs"]
    with pytest.raises(ValueError, match="no room"):
        WordTokenizer([], 1)
