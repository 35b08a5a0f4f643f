"""A reader says together what it says alone, from memory or from passages, and knows how sure it is."""

from __future__ import annotations

import math
import sys
from dataclasses import replace

import pytest
import torch

from common.config import ConfigError
from common.errors import ProjectError
from common.pretrained import available
from rag.config import Config
from rag.data.corpus import Passage
from rag.reader.decode import Causal, Rules, first_token
from rag.reader.examples import PLAIN_EXAMPLES
from rag.reader.llama import LlamaCpp, find_gguf
from rag.reader.prompt import parse
from rag.reader.reader import Answer, batches, matching, stop_rules
from rag.reader.weights import build_reader, open_reader
from rag.settings import ReaderConfig
from tests.rag import tiny_lm

CONFIG = ReaderConfig(answer_tokens=6, examples=2, cite="model")
PASSAGES = [
    Passage("a", "The river Aln flows through the town of Brel.", "Aln"),
    Passage("b", "Mira Tolle was born in 1871 and worked as a glazier. " * 3, "Mira Tolle"),
    Passage("c", "The Denver Broncos won the game in 2016.", "Denver Broncos"),
]
QUESTIONS = [
    "Who won the game?",
    "When was she born, and where does the house of her family stand now?",
    "Which river?",
]
GIVEN = [PASSAGES[:2], PASSAGES, PASSAGES[2:]]
MODELS = {"llama": tiny_lm.llama, "gpt2": tiny_lm.gpt2, "t5": tiny_lm.t5}


def make(model, examples=PLAIN_EXAMPLES[:2], **changes):
    return build_reader(replace(CONFIG, **changes), model, tiny_lm.tokenizer(), examples)


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("closed", [False, True], ids=["open", "closed"])
def test_a_batch_says_what_each_says_alone(kind, closed):
    model = MODELS[kind]()
    given = None if closed else GIVEN
    together = make(model).answer(QUESTIONS, given)
    for i, answer in enumerate(together):
        (alone,) = make(model).answer([QUESTIONS[i]], None if closed else [GIVEN[i]])
        assert (alone.text, alone.cited, alone.passages) == (answer.text, answer.cited, answer.passages)
        assert math.isclose(alone.log_prob, answer.log_prob, abs_tol=1e-4)
        assert math.isclose(alone.no_answer, answer.no_answer, abs_tol=1e-5)
    assert len({answer.text for answer in together}) > 1, "this model says the same whatever it reads"


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_the_kept_prefix_is_that_of_a_prompt_read_whole(kind):
    """Greedy tokens and their probabilities equal transformers' own, over prefix and suffix as one text."""
    model = MODELS[kind]()
    reader = make(model)
    prompt = reader.prompter.build(QUESTIONS[0], GIVEN[0])
    whole = torch.tensor([reader.prompter.prefix + prompt.ids])
    steps = list(reader.decoder.greedy(reader.prompter.prefix, [prompt.ids], reader.rules))
    ids = whole
    for i, step in enumerate(steps):
        with torch.no_grad():
            logits = model(ids).logits[0, -1]
        if i == 0:
            unknown = logits.softmax(0)[list(reader.rules.abstain)].sum()
            assert torch.allclose(step.abstain[0], unknown, atol=1e-6)
            logits[[*reader.rules.never_first, *reader.rules.abstain]] = -torch.inf
        assert int(step.tokens[0]) == int(logits.argmax())
        assert torch.allclose(step.log_probs[0], logits.log_softmax(0).max(), atol=1e-4)
        ids = torch.cat([ids, step.tokens.reshape(1, 1)], 1)


def test_a_second_batch_finds_the_prefix_as_it_was():
    reader = make(tiny_lm.llama())
    first = reader.answer(QUESTIONS, GIVEN)
    assert reader.answer(QUESTIONS, GIVEN) == first
    (kept,) = reader.decoder._kept.values()
    assert kept.get_seq_length() == len(reader.prompter.prefix)


def test_streaming_says_the_same():
    for seed in range(3):
        reader = make(tiny_lm.llama(seed), answer_tokens=12)
        *parts, last = reader.stream(QUESTIONS[0], GIVEN[0])
        (answer,) = reader.answer([QUESTIONS[0]], [GIVEN[0]])
        assert isinstance(last, Answer) and last.text == answer.text
        assert math.isclose(last.confidence, answer.confidence, abs_tol=1e-5)
        assert parse("".join(parts), 2)[0] == answer.text


class Scripted(Causal):
    """A decoder that says what it is told, with certain probabilities."""

    def __init__(self, ids, log_prob, no_answer):
        self.ids, self.log_prob, self.no_answer = ids, log_prob, no_answer
        self.seconds = {"read": 0.0, "write": 0.0}

    def greedy(self, prefix, suffixes, rules):
        from rag.reader.decode import Step

        for i, token in enumerate(self.ids):
            abstain = torch.tensor([self.no_answer] * len(suffixes)) if i == 0 else None
            log_prob = self.log_prob if i < 1 else -3.0
            yield Step(torch.tensor([token] * len(suffixes)), torch.tensor([log_prob] * len(suffixes)), abstain)


def test_confidence_is_of_the_answer_and_not_of_its_citation():
    reader = make(tiny_lm.llama())
    said = reader.prompter.encode(" Denver [2]\nQuestion")
    at = next(i for i, token in enumerate(said) if "[" in reader.decode([token]))
    reader.decoder = Scripted(said, -0.5, 0.25)
    (answer,) = reader.answer(["Who won?"], [PASSAGES])
    assert answer.text == "Denver" and answer.cited == (1,)
    expected = (-0.5 - 3.0 * (at - 1)) / at
    assert math.isclose(answer.log_prob, expected, abs_tol=1e-6)
    assert math.isclose(answer.confidence, 0.75 * math.exp(expected), abs_tol=1e-6)


def test_sources_named_first_are_no_part_of_the_answer():
    reader = make(tiny_lm.llama(), cite="first")
    assert not {t for t in reader.rules.never_first if "[" in reader.decode([t])}  # an answer may begin with a bracket
    cited = reader.prompter.encode(" [1] [2]")
    words = reader.prompter.encode(" Denver")
    said = [*cited, *words, *reader.prompter.encode("\nQuestion")]
    reader.decoder = Scripted(said, -0.5, 0.25)
    (answer,) = reader.answer(["Who won?"], [PASSAGES])
    assert answer.text == "Denver" and answer.cited == (0, 1)
    assert math.isclose(answer.log_prob, -3.0, abs_tol=1e-6)  # -0.5 is the first bracket's
    assert math.isclose(answer.confidence, 0.75 * math.exp(-3.0), abs_tol=1e-6)
    assert reader.words(said[: len(cited) + len(words)]) == slice(len(cited), None)
    assert reader.words(cited) == slice(None)  # nothing else was said
    plain = reader.prompter.encode(" Denver [2]")
    assert reader.decode(plain[reader.words(plain)]).strip() == "Denver"


def test_citations_only_name_what_was_shown():
    assert parse(" Paris [2][9] [0] [2]\nQuestion: x", 3) == ("Paris", (1,))
    assert parse("[1]", 1) == ("", (0,))
    assert parse("Paris", 3) == ("Paris", ())
    assert parse("in [the] year 1871 [999]", 99) == ("in [the] year 1871", ())
    assert matching("the Broncos", PASSAGES) == (2,)
    assert matching("bronco", PASSAGES) == () and matching(" ", PASSAGES) == ()
    reader = make(tiny_lm.llama(), cite="match")
    reader.decoder = Scripted(reader.prompter.encode(" glazier [1]\n"), -0.5, 0.0)
    assert reader.answer(["What was her work?"], [PASSAGES])[0].cited == (1,)


def test_an_answer_is_never_empty_nor_the_word_for_none():
    model = tiny_lm.llama()
    reader = make(model)
    tokenizer = tiny_lm.tokenizer()
    word = tokenizer(" unknown", add_special_tokens=False)["input_ids"][0]
    assert word in reader.rules.abstain
    newline = tokenizer("\n", add_special_tokens=False)["input_ids"][0]
    assert {newline, *tokenizer.all_special_ids} <= set(reader.rules.stop) <= set(reader.rules.never_first)
    assert tokenizer(" [", add_special_tokens=False)["input_ids"][-1] in reader.rules.never_first
    with torch.no_grad():  # whatever it reads, it would rather end or say that it does not know
        model.lm_head.weight.zero_()
        for token, value in ((newline, 3.0), (word, 2.0), (50, 1.0)):
            model.lm_head.weight[token] = value
        model.model.norm.weight.fill_(1.0)
    for answer in reader.answer(QUESTIONS, GIVEN):
        assert answer.text != "unknown"
    (step, *_) = reader.decoder.greedy(reader.prompter.prefix, [[5]], reader.rules)
    assert int(step.tokens[0]) not in (newline, word)


def test_batches_keep_within_the_limit_and_every_row_once():
    lengths = [5, 900, 30, 31, 29, 28, 400, 1]
    found = batches(lengths, 100, 600)
    assert sorted(row for rows in found for row in rows) == list(range(8))
    for rows in found:
        assert len(rows) == 1 or len(rows) * (100 + max(lengths[row] for row in rows)) <= 600
    assert found[0] == [1]
    assert batches([], 3, 10) == []


def test_weights_from_a_folder(tmp_path):
    folder = tiny_lm.save(tmp_path / "lm")
    config = Config(run_dir=str(tmp_path / "run"), reader=replace(CONFIG, model=str(folder)))
    reader, name = open_reader(config, torch.device("cpu"), torch.float32, PLAIN_EXAMPLES)
    assert "2 examples" in name
    assert reader.answer(QUESTIONS, GIVEN) == make(tiny_lm.llama()).answer(QUESTIONS, GIVEN)
    with pytest.raises(ConfigError, match=r"reader\.weights"):
        open_reader(
            replace(config, reader=replace(config.reader, weights=str(tmp_path))), torch.device("cpu"), torch.float32
        )
    (folder / "config.json").write_text("{}")
    with pytest.raises(ProjectError, match="cannot be read as a language model"):
        open_reader(config, torch.device("cpu"), torch.float32)
    bare = tiny_lm.tokenizer().__class__.from_pretrained(folder)
    bare.chat_template = None
    with pytest.raises(ConfigError, match="chat template"):
        build_reader(replace(CONFIG, style="chat"), tiny_lm.llama(), bare)


def test_a_word_for_none_of_several_tokens():
    logits = torch.tensor([[0.0, 3.0, 1.0]])
    step, _ = first_token(logits, Rules((1,), (1,), (), 0, 4))
    assert int(step.tokens[0]) == 2 and float(step.abstain[0]) == 0
    reader = make(tiny_lm.llama(), abstain="zebra")
    assert len(reader.rules.abstain) == 1 and "zebra".startswith(reader.decode(list(reader.rules.abstain)).strip())


def test_the_word_for_none_has_several_spellings():
    """A finetuned reader that may not say `unknown` said `Unknown`, and so kept silent where it had to answer."""

    class Spelled:
        """A tokenizer of a few whole words."""

        words = (" a", " unknown", "unknown", " Unknown", "UNKNOWN", " unknowns", "[", "\n")
        all_special_ids = ()

        def __len__(self):
            return len(self.words)

        def batch_decode(self, rows, **_):
            return ["".join(self.words[i] for i in row) for row in rows]

        def __call__(self, text, **_):
            return {"input_ids": [self.words.index(text)]}

    rules = stop_rules(Spelled(), CONFIG, " ", 0, [])
    assert rules.abstain == (1, 2, 3, 4)
    logits = torch.tensor([[1.0, 9, 9, 9, 9, 0, 9, 9]])
    step, _ = first_token(logits, rules)
    assert int(step.tokens[0]) == 0
    assert float(step.abstain[0]) == pytest.approx(float(logits.softmax(1)[0, 1:5].sum()))


@pytest.mark.skipif(not available(ReaderConfig.model), reason="SmolLM2 is not on this machine; make offline")
def test_smollm2_reads():
    config = Config(reader=ReaderConfig(examples=2, answer_tokens=8, weights="base"))
    reader, _ = open_reader(config, torch.device("cpu"), torch.bfloat16, PLAIN_EXAMPLES)
    question = "In which year did the Denver Broncos win the game?"
    with_passage, without = reader.answer([question], [PASSAGES[2:]]), reader.answer([question], None)
    assert "2016" in with_passage[0].text
    assert without[0].passages == ()


# -- llama.cpp ---------------------------------------------------------------------------------------------------------


class FakeLlama:
    """What is used of llama_cpp.Llama, with a model of transformers behind it."""

    def __init__(self, model):
        self.model, self.ids, self.n_tokens, self.read = model, [], 0, 0
        self.ctx = self

    def reset(self):
        self.n_tokens = 0

    def eval(self, tokens):
        self.ids = self.ids[: self.n_tokens] + tokens
        self.n_tokens = len(self.ids)
        self.read += len(tokens)

    def n_vocab(self):
        return self.model.config.vocab_size

    def llama_get_logits_ith(self, ctx, place):
        import ctypes

        with torch.no_grad():
            logits = self.model(torch.tensor([self.ids])).logits[0, place].float().numpy()
        self.kept = logits.copy()
        return self.kept.ctypes.data_as(ctypes.POINTER(ctypes.c_float))


def test_llama_cpp_is_driven_to_the_same_answers():
    """Against a stand-in for the library: that prompts, the kept prefix and the choice of tokens are as elsewhere."""
    reader = make(tiny_lm.llama())
    expected = reader.answer(QUESTIONS, GIVEN)
    fake = FakeLlama(tiny_lm.llama())
    reader.decoder = LlamaCpp(fake, fake)
    for answer, other in zip(reader.answer(QUESTIONS, GIVEN), expected, strict=True):
        assert (answer.text, answer.cited) == (other.text, other.cited)
        assert math.isclose(answer.confidence, other.confidence, abs_tol=1e-4)
    *parts, last = reader.stream(QUESTIONS[1], GIVEN[1])
    assert last.text == expected[1].text and len(parts) > 1
    prompts = sum(len(reader.prompter.build(q, its).ids) for q, its in zip(QUESTIONS, GIVEN))
    again = len(reader.prompter.build(QUESTIONS[1], GIVEN[1]).ids)
    assert fake.read <= len(reader.prompter.prefix) + prompts + again + 4 * CONFIG.answer_tokens, "the prefix: once"


def test_llama_cpp_reads():
    pytest.importorskip("llama_cpp", reason="pip install llama-cpp-python")
    if not available(ReaderConfig.model):
        pytest.skip("SmolLM2 is not on this machine; make offline")
    config = Config(reader=ReaderConfig(examples=2, answer_tokens=8, backend="llama.cpp"))
    reader, _ = open_reader(config, torch.device("cpu"), torch.float32, PLAIN_EXAMPLES)
    assert "2016" in reader.answer(["In which year did the Denver Broncos win the game?"], [PASSAGES[2:]])[0].text


def test_llama_cpp_wants_a_file(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "llama_cpp", None)
    config = Config(reader=ReaderConfig(backend="llama.cpp", model="nowhere.gguf"))
    with pytest.raises(ProjectError, match="pip install llama-cpp-python"):
        open_reader(config, torch.device("cpu"), torch.float32)
    with pytest.raises(ConfigError, match=r"reader\.model"):
        find_gguf("nowhere.gguf")
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter/adapter_config.json").write_text("{}")
    (tmp_path / "config.yaml").write_text("seed: 0\n")
    config = replace(config, run_dir=str(tmp_path))
    with pytest.raises(ConfigError, match="adapter"):
        open_reader(config, torch.device("cpu"), torch.float32)
