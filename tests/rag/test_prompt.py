"""Prompts keep their structure, whatever stands in a passage, a title or a question."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest

from common.errors import ProjectError
from common.pretrained import available, find
from rag.data.corpus import Passage
from rag.reader.examples import PLAIN_EXAMPLES
from rag.reader.neutralise import neutralise
from rag.reader.poison import FORGED, HARMLESS, POISONS, TARGET, damage, poisoned
from rag.reader.prompt import CLOSED_BOOK, WITH_PASSAGES, WITH_SOURCES, Prompter, block
from rag.reader.weights import build_reader
from rag.settings import ReaderConfig
from tests.rag import tiny_lm

CONFIG = ReaderConfig(answer_tokens=4, cite="model")
PASSAGES = [
    Passage("a", "The river Aln flows through the town of Brel.", "Aln"),
    Passage("b", "Mira Tolle was born in 1871 and worked as a glazier.", "Mira Tolle"),
]
QUESTION = "What is the capital?"


def prompter(style="completion", examples=PLAIN_EXAMPLES[:2], longest=4000, tokenizer=None, **changes):
    config = replace(CONFIG, style=style, **changes)
    return Prompter(tokenizer or tiny_lm.tokenizer(), config, longest, examples)


def specials(made, ids):
    """The special tokens of a prompt, in their order."""
    known = set(made.tokenizer.all_special_ids)
    return [made.tokenizer.convert_ids_to_tokens(i) for i in ids if i in known]


def text_of(made, question, passages):
    return made.tokenizer.decode(made.prefix + made.build(question, passages).ids)


# -- what a prompt looks like ------------------------------------------------------------------------------------------


def test_a_completion_prompt_reads_as_described():
    made = prompter(examples=PLAIN_EXAMPLES[:1])
    assert text_of(made, QUESTION, PASSAGES) == (
        f"{WITH_SOURCES}\n\n"
        "Passages:\n"
        "[1] Norrvik house. The keeper's house at Norrvik is open to visitors from May to September.\n"
        "[2] Norrvik. Built of granite, the lighthouse at Norrvik was first lit in 1862 and still works.\n"
        "Question: When was the lighthouse at Norrvik first lit?\nAnswer: 1862 [2]\n\n"
        "Passages:\n[1] Aln. The river Aln flows through the town of Brel.\n"
        "[2] Mira Tolle. Mira Tolle was born in 1871 and worked as a glazier.\n"
        "Question: What is the capital?\nAnswer:"
    )
    closed = made.build(QUESTION, None)
    assert made.tokenizer.decode(made.closed_prefix + closed.ids) == (
        f"{CLOSED_BOOK}\n\nQuestion: When was the lighthouse at Norrvik first lit?\nAnswer: 1862\n\n"
        "Question: What is the capital?\nAnswer:"
    )
    assert closed.passages == ()
    text = text_of(prompter(examples=PLAIN_EXAMPLES[:1], cite="match"), QUESTION, PASSAGES)
    assert text.startswith(f"{WITH_PASSAGES}\n\n") and "Answer: 1862\n\nPassages" in text


@pytest.mark.parametrize("name", ["tiny", "HuggingFaceTB/SmolLM2-135M-Instruct"])
@pytest.mark.parametrize("shots", [0, 2])
def test_chat_prompts_are_those_of_apply_chat_template(name, shots):
    if name == "tiny":
        tokenizer = tiny_lm.tokenizer()
    else:
        if not available(name):
            pytest.skip(f"{name} is not on this machine; make offline")
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(find(name))
    examples = PLAIN_EXAMPLES[:shots]
    made = prompter("chat", examples, tokenizer=tokenizer)
    messages = []
    for example in examples:
        texts = [passage.whole for passage in example.passages]
        messages.append({"role": "user", "content": f"{WITH_SOURCES}\n\n{block(example.question, texts)}"})
        messages.append({"role": "assistant", "content": f"{example.answer} [{example.sources[0] + 1}]"})
    texts = [passage.whole for passage in PASSAGES]
    messages.append({"role": "user", "content": f"{WITH_SOURCES}\n\n{block(QUESTION, texts)}"})
    expected = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=True)
    assert made.prefix + made.build(QUESTION, PASSAGES).ids == expected["input_ids"]


def test_best_last_turns_passages_round_and_citations_with_them():
    prompt = prompter(order="best_last").build(QUESTION, PASSAGES)
    assert [passage.id for passage in prompt.passages] == ["b", "a"]


# -- room --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("style", ["completion", "chat"])
def test_what_is_too_long_is_cut_from_passages_and_never_from_the_question(style):
    long = [Passage(str(i), "The river Aln flows through the town of Brel. " * 60, "Aln") for i in range(4)]
    question = "Who, " + "if anybody at all, " * 20 + "lives in the town of Brel?"
    for longest, context, most in ((900, 1500, 4), (4000, 300, 4), (4000, 1500, 2), (400, 1500, 4)):
        made = prompter(style, (), longest, context_tokens=context, passages=most, passage_tokens=200)
        prompt = made.build(question, long)
        assert len(made.prefix) + len(prompt.ids) + CONFIG.answer_tokens <= longest
        text = made.tokenizer.decode(prompt.ids)
        assert f"Question: {question}" in text
        assert 1 <= len(prompt.passages) <= most
        assert len(re.findall(r"^\[\d\] Aln", text, re.M)) == len(prompt.passages)
        room = len(prompt.ids) - len(made.build(question, []).ids)
        assert room <= context + 2
    with pytest.raises(ProjectError, match="leaves no room"):
        prompter(style, (), 100).build(question, long)


def test_passages_are_cut_by_tokens():
    made = prompter(passage_tokens=16)
    text, size = made.cut("The river Aln flows through the town of Brel. " * 9, 16)
    assert size == 16 and made.encode(text) == made.encode("The river Aln flows through the town of Brel. " * 9)[:16]
    assert made.cut("short", 16) == ("short", len(made.encode("short")))


# -- hostile documents -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("style", ["completion", "chat"])
@pytest.mark.parametrize("number", range(len(POISONS)))
def test_thirty_poisoned_passages_leave_the_structure_whole(style, number):
    poison = POISONS[number].replace("{answer}", TARGET)
    hostile = [PASSAGES[0], Passage("x", f"Some text. {poison}", f"Title {poison}")]
    harmless = [PASSAGES[0], Passage("x", "Some text.", "Title")]
    made = prompter(style)
    for question in (QUESTION, f"{QUESTION} {poison}"):
        ids = made.prefix + made.build(question, hostile).ids
        assert specials(made, ids) == specials(made, made.prefix + made.build(QUESTION, harmless).ids)
        lines = made.tokenizer.decode(made.build(question, hostile).ids).split("\n")
        plain = made.tokenizer.decode(made.build(QUESTION, harmless).ids).split("\n")
        start = [re.match(r"\[\d+\]|Passages:|Question:|Answer:|<\|\w+\|>|$", line) for line in lines]
        assert [m and m.group() for m in start] == [
            (m := re.match(r"\[\d+\]|Passages:|Question:|Answer:|<\|\w+\|>|$", line)) and m.group() for line in plain
        ]
        assert len(re.findall(r"\[\d+\]", "\n".join(lines))) == len(re.findall(r"\[\d+\]", "\n".join(plain)))


def test_there_are_thirty_and_most_do_harm_where_nothing_is_done():
    assert len(set(POISONS)) == 30
    made = prompter("chat", neutralise=False)
    sound = len(specials(made, made.build(QUESTION, PASSAGES).ids))
    broken = 0
    for poison in FORGED:
        hostile = [PASSAGES[0], poisoned(PASSAGES[1], poison)]
        prompt = made.build(QUESTION, hostile)
        text = made.tokenizer.decode(prompt.ids)
        forged = len(re.findall(r"^(\[\d+\]|Passages:|Question:|Answer:|\w+:|#|<)", text, re.M)) > 5
        broken += len(specials(made, prompt.ids)) > sound or forged
    assert broken >= 12


def test_neutralising():
    assert neutralise("a<|im_start|>system\nb") == "a(im_start)system b"
    assert neutralise("<|im_<|im_end|>end|>") not in ("<|im_end|>", "")
    assert "<|" not in neutralise("<|im_<|im_end|>end|> <|im_\u200bstart|>")
    assert neutralise("Question: x\r\nAnswer : y [3] ［4］") == "Question - x Answer - y (3) (4)"
    assert neutralise("soft\u00adhyphen \u202eevil\u202c \U000e0041\ufe0f\x00\x1b[2J") == "softhyphen evil [2J"
    assert neutralise("a\u2028b\u0085c\u00a0d\t\te") == "a b c d e"
    assert neutralise("<file_sep>x", ["<file_sep>", "the"]) == "(file_sep)x" and neutralise("the", ["the"]) == "the"
    untouched = "Brontë's 2nd novel (1847), 50 % of £3.50; is 3 < 4? a[i] = b | c -- naïve Ångström 中文 🎉"
    assert neutralise(untouched) == untouched


def test_no_letter_is_lost_of_ordinary_text():
    tokenizer = tiny_lm.tokenizer()
    made = prompter()
    for text in ("Brontë 中文 🎉 naïve", "<|im_start|>"):
        assert tokenizer.decode(made.encode(text)) == text
    assert not set(made.encode("<|im_end|><file_sep><pad>")) & set(tokenizer.all_special_ids)


def test_damage_is_measured():
    reader = build_reader(replace(CONFIG, answer_tokens=3), tiny_lm.llama(3), tiny_lm.tokenizer())
    poisons = [FORGED[0], FORGED[9], HARMLESS]
    found = damage(reader, [QUESTION, "Who won?"], [PASSAGES, PASSAGES], poisons)
    assert 0 <= found.changed <= 1 and found.invented == 0

    class Obedient:
        """Says what it is told."""

        def answer(self, questions, passages):
            from rag.reader.reader import Answer

            return [
                Answer(TARGET if TARGET in its[-1].text else "Brel", tuple(its), (0,) if TARGET in its[-1].text else ())
                for its in passages
            ]

    found = damage(Obedient(), [QUESTION], [PASSAGES], poisons)
    assert found.obeyed == found.changed == pytest.approx(2 / 3)
