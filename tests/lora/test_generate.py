"""Answers token by token: in batches as alone, by beams as by trying everything, streamed as at once."""

from __future__ import annotations

import io
import itertools
import json

import pytest
import torch

from common.config import load
from common.errors import ProjectError
from lora.config import Config, GenerateConfig, ModelConfig
from lora.data.templates import end_of
from lora.generate import check_room, find_adapter
from lora.model import hidden_states, load_language_model, load_tokenizer, token_logits
from lora.model.decoding import Reader, TextStream, narrow, write_answers
from lora.model.load import load_llama
from lora.tuning import Base
from tests.lora.small import call

CPU = torch.device("cpu")
PROMPTS = [[5, 9, 40], [7], [30, 31, 32, 33, 34, 35, 36, 37], [8, 200]]


@pytest.fixture(scope="module", params=["ours", "transformers"])
def model(request, base):
    return load_language_model(ModelConfig(name="x", code=request.param), base, torch.float32, CPU)


def by_hand(model, prompt, count, ends=()):
    """Greedy, without a cache."""
    tokens = list(prompt)
    with torch.no_grad():
        for _ in range(count):
            token = int(token_logits(model, hidden_states(model, torch.tensor([tokens])))[0, -1].argmax())
            if token in ends:
                break
            tokens.append(token)
    return tokens[len(prompt) :]


def test_a_batch_filled_up_on_the_left_answers_as_each_alone(model):
    answers = write_answers(model, PROMPTS, GenerateConfig(max_tokens=12), {1})
    assert answers == [by_hand(model, prompt, 12, {1}) for prompt in PROMPTS]


def test_logits_do_not_depend_on_the_rest_of_the_batch(model):
    with torch.no_grad():
        together = Reader(model, PROMPTS, 4).logits
        for row, prompt in enumerate(PROMPTS):
            torch.testing.assert_close(together[row], Reader(model, [prompt], 4).logits[0], atol=2e-5, rtol=1e-4)


def test_finished_rows_are_dropped_and_change_nothing(model):
    """Ends that come early in some rows and late in others: the cache is cut down on the way."""
    free = [by_hand(model, prompt, 10) for prompt in PROMPTS]
    ends = {free[0][2], free[1][0], free[3][1]}
    answers = write_answers(model, PROMPTS, GenerateConfig(max_tokens=10), ends)
    assert answers == [by_hand(model, prompt, 10, ends) for prompt in PROMPTS]
    assert len({len(answer) for answer in answers}) > 1


def test_answers_equal_those_of_transformers(base):
    from transformers import AutoModelForCausalLM

    theirs = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    ours = load_llama(base, torch.float32, CPU)
    for prompt in PROMPTS:
        expected = theirs.generate(torch.tensor([prompt]), max_new_tokens=12, do_sample=False, eos_token_id=1)[0]
        expected = [token for token in expected.tolist()[len(prompt) :] if token != 1]
        assert write_answers(ours, [prompt], GenerateConfig(max_tokens=12), {1})[0] == expected


def test_beams_find_what_trying_everything_finds(base, monkeypatch):
    """A vocabulary cut down to five tokens and answers of at most three: all of them can be scored."""
    model = load_llama(base, torch.float32, CPU)
    small = [1, 4, 5, 6, 7]

    def few_logits(model, states):
        logits = token_logits(model, states)
        closed = torch.ones(logits.shape[-1], dtype=torch.bool)
        closed[small] = False
        return logits.masked_fill(closed, -1e9)

    monkeypatch.setattr("lora.model.decoding.token_logits", few_logits)
    prompt = [9, 10]

    def score(answer):
        tokens = torch.tensor([[*prompt, *answer]])
        with torch.no_grad():
            log = few_logits(model, hidden_states(model, tokens)).log_softmax(-1)[0]
        places = range(len(prompt) - 1, len(prompt) - 1 + len(answer))
        return sum(float(log[place, token]) for place, token in zip(places, answer, strict=True)) / len(answer)

    answers = [(*start, 1) for length in range(3) for start in itertools.product(small[1:], repeat=length)]
    answers += list(itertools.product(small[1:], repeat=3))  # cut off
    best = max(answers, key=score)
    found = write_answers(model, [prompt], GenerateConfig(max_tokens=3, beams=200), {1})[0]
    whole = (*found, 1) if len(found) < 3 else tuple(found)
    assert score(whole) == pytest.approx(score(best), abs=1e-5)


def test_one_beam_more_never_hurts_and_batches_change_nothing(model):
    config = GenerateConfig(max_tokens=8, beams=4)
    together = write_answers(model, PROMPTS, config, {1})
    assert together == [write_answers(model, [prompt], config, {1})[0] for prompt in PROMPTS]


def test_longer_answers_with_a_higher_length_penalty(base):
    model = load_llama(base, torch.float32, CPU)
    ends = set(range(0, 300, 3))  # an end is likely everywhere
    lengths = []
    for penalty in (-2.0, 1.0, 4.0):
        config = GenerateConfig(max_tokens=10, beams=6, length_penalty=penalty)
        lengths.append(sum(map(len, write_answers(model, PROMPTS, config, ends))))
    assert lengths[0] < lengths[2]
    assert lengths == sorted(lengths)


def test_drawn_answers_depend_on_the_seed_only(base):
    model = load_llama(base, torch.float32, CPU)
    config = GenerateConfig(max_tokens=10, temperature=1.0)
    first = write_answers(model, PROMPTS, config, {1}, seed=1)
    assert first == write_answers(model, PROMPTS, config, {1}, seed=1)
    assert first != write_answers(model, PROMPTS, config, {1}, seed=2)
    cold = GenerateConfig(max_tokens=10, temperature=1e-4)
    assert write_answers(model, PROMPTS, cold, {1}) == write_answers(model, PROMPTS, GenerateConfig(max_tokens=10), {1})


def test_drawn_tokens_come_as_often_as_they_should(base):
    from lora.model.decoding import choose

    logits = torch.tensor([[1.0, 0.0, -1.0, 2.0]]).expand(4000, 4)
    rngs = [torch.Generator().manual_seed(i) for i in range(4000)]
    drawn = choose(logits, GenerateConfig(temperature=2.0), rngs)
    shares = torch.bincount(drawn, minlength=4) / 4000
    torch.testing.assert_close(shares, (logits[0] / 2).softmax(0), atol=0.03, rtol=0)


def test_only_the_most_probable_are_drawn_from():
    logits = torch.tensor([[0.0, 3.0, 1.0, 2.0]])
    assert narrow(logits, 2, 1.0).isfinite().tolist() == [[False, True, False, True]]
    p = logits.softmax(1)[0]
    assert narrow(logits, 0, float(p[1]) - 0.01).isfinite().tolist() == [[False, True, False, False]]
    assert narrow(logits, 0, float(p[1]) + 0.01).isfinite().tolist() == [[False, True, False, True]]
    assert narrow(logits, 0, 1.0).isfinite().all()


def test_streamed_pieces_are_the_text(base):
    tokenizer = load_tokenizer(base)
    text = "Red Fox: caf\u00e9 \u20ac 5, \U0001f98a!"
    stream = TextStream(tokenizer)
    pieces = [stream.add(token) for token in tokenizer(text, add_special_tokens=False)["input_ids"]]
    assert "".join(pieces) == text
    assert len([piece for piece in pieces if piece]) > 5
    assert not any("\ufffd" in piece for piece in pieces)


def test_the_program_answers_every_prompt(trained, tmp_path, capsys):
    out = tmp_path / "answers.jsonl"
    words = ["name: Red Fox | kind: pub", "name: Old Owl | kind: bar | food: Thai", f"--out={out}"]
    assert call("generate", trained, *words, words="prompt", short={"out": "generate.out"}) == 0
    shown = capsys.readouterr().out
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["prompt"] for row in rows] == words[:2]
    for row in rows:
        assert f"> {row['prompt']}\n{row['answer']}" in shown


def test_one_prompt_is_streamed_and_the_same(trained, capsys):
    prompt = "name: Red Fox | kind: pub"
    assert call("generate", trained, prompt, words="prompt") == 0
    alone = capsys.readouterr().out.strip()
    assert call("generate", trained, prompt, prompt, words="prompt") == 0
    assert f"> {prompt}\n{alone}" in capsys.readouterr().out


def test_prompts_from_stdin_and_none_at_all(trained, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("name: Red Fox\n\nname: Old Owl\n"))
    assert call("generate", trained, words="prompt") == 0
    assert capsys.readouterr().out.count("> name") == 2
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    assert call("generate", trained, words="prompt") == 1
    assert "no prompt" in capsys.readouterr().err


def test_adapters_by_name(trained, base, capsys):
    prompt = "name: Red Fox | kind: pub"
    texts = []
    for words in ([], [f"generate.adapter={trained / 'adapter'}"], ["generate.adapter=none"]):
        assert call("generate", trained, prompt, "generate.max_tokens=12", *words, words="prompt") == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1]
    model = load_llama(base, torch.float32, CPU)
    tokenizer = load_tokenizer(base)
    ids = tokenizer(f"{prompt}\n", add_special_tokens=False)["input_ids"]
    expected = by_hand(model, ids, 12, {end_of(tokenizer)})
    assert texts[2].strip() == tokenizer.decode(expected, skip_special_tokens=True).strip()
    with pytest.raises(ProjectError, match="there is no folder"):
        find_adapter("/nowhere/at/all")


def test_too_long_prompts_are_refused(base):
    small = Base(load_llama(base, torch.float32, CPU), load_tokenizer(base), base, torch.float32)
    config, _ = Config(), None
    with pytest.raises(ProjectError, match="more than the 256"):
        check_room([[3] * 200], small, config)
    check_room([[3] * 20], small, config)
    with pytest.raises(ProjectError, match="a prompt is empty"):
        check_room([[]], small, config)


def test_a_classifier_writes_nothing(trained, capsys):
    config, options = load(Config, "lora", "generate", ["--run", str(trained), "hello"], words="prompt")
    assert options.words == ("hello",)
    assert not config.classifies
