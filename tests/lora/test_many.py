"""Several runs behind one question: prompts find their run, mixed batches answer as each run alone does."""

from __future__ import annotations

import json
import shutil

import pytest
import torch

from lora.adapters.multi import Bank
from lora.config import GenerateConfig
from lora.model import load_tokenizer
from lora.model.decoding import write_answers
from lora.model.load import load_llama
from tests.lora.small import call, train

CPU = torch.device("cpu")
SUMS = [
    {"instruction": f"add {a} and {b} and {a + b}", "output": str(2 * (a + b))} for a in range(12) for b in range(12)
]
SLOTS = "name: Red Raven | kind: restaurant | food: Greek"


@pytest.fixture(scope="module")
def encoder(base, tmp_path_factory):
    """A sentence encoder with random weights: it knows texts by their tokens."""
    from transformers import BertConfig, BertModel

    folder = tmp_path_factory.mktemp("encoder") / "bert"
    shutil.copytree(base, folder)
    (folder / "model.safetensors").unlink()
    torch.manual_seed(0)
    size = len(load_tokenizer(base))
    BertModel(
        BertConfig(vocab_size=size, hidden_size=48, num_hidden_layers=1, num_attention_heads=2, intermediate_size=48)
    ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def runs(base, tmp_path_factory):
    """Two runs on one base: sentences from slots, and sums."""
    root = tmp_path_factory.mktemp("runs")
    (root / "sums.json").write_text(json.dumps(SUMS))
    assert train(base, root / "slots", "train.lr=0.02") == 0
    words = ["data.dataset=json", f"data.path={root / 'sums.json'}", "data.validation=0.3", "adapter.rank=2"]
    assert train(base, root / "sums", *words, "train.lr=0.02") == 0
    return root


def ask(runs, encoder, *words):
    settings = [f"many.runs=[{runs / 'sums'}]", f"many.encoder={encoder}", "many.prompts=40", "many.held_out=40"]
    kinds = {"short": {"out": "generate.out", "measure": "many.measure"}, "words": "prompt"}
    return call("many", runs / "slots", *settings, *words, **kinds)


def test_test_prompts_find_their_run(runs, encoder, tmp_path, capsys):
    text = tmp_path / "general.txt"
    text.write_text("The harbour of the old town was rebuilt in the nineteenth century, said the mayor.\n" * 8)
    assert ask(runs, encoder, "many.keep=1", "--measure", "8", f"many.unknown={text}") == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["metrics"]["routing_accuracy"] >= 0.9
    assert result["metrics"]["routed_base"] == 1.0
    assert result == json.loads((runs / "slots" / "routing.json").read_text())
    header, *rows = (runs / "slots" / "routing.csv").read_text().splitlines()
    assert header == "prompts_of,number,slots,sums,base" and len(rows) == 3


def test_a_text_without_lines_is_refused(runs, encoder, tmp_path, capsys):
    (tmp_path / "short.txt").write_text("too short\n")
    assert ask(runs, encoder, "--measure", "2", f"many.unknown={tmp_path / 'short.txt'}") == 2
    assert "has no line of 40 characters" in capsys.readouterr().err


def test_each_prompt_is_answered_by_its_run(runs, encoder, tmp_path, capsys):
    out = tmp_path / "answers.jsonl"
    prompts = [SLOTS, "add 3 and 4 and 7", "name: Silver Raven | kind: bar | food: Indian"]
    assert ask(runs, encoder, "many.keep=1", *prompts, "--out", str(out)) == 0
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["adapter"] for row in rows] == ["slots", "sums", "slots"]
    alone = {}
    for name in ("slots", "sums"):
        chosen = [row["prompt"] for row in rows if row["adapter"] == name]
        assert (
            call("generate", runs / name, *chosen, "--out", str(out), short={"out": "generate.out"}, words="prompt")
            == 0
        )
        alone |= {row["prompt"]: row["answer"] for row in map(json.loads, out.read_text().splitlines())}
    assert {row["prompt"]: row["answer"] for row in rows} == alone
    assert "[sums] " in capsys.readouterr().out


@pytest.mark.parametrize("beams", [1, 3])
def test_rows_keep_their_adapter_when_others_are_finished(base, runs, beams):
    """Ends that come early in some rows: the batch shrinks, and beams change places."""
    model = load_llama(base, torch.float32, CPU)
    prompts = [[5, 9, 40], [7, 11, 12], [30, 31, 32], [8, 200, 3], [9, 9, 9]]
    names = ["slots", "sums", "base", "sums", "slots"]
    config = GenerateConfig(max_tokens=8, beams=beams)
    bank = Bank(model)
    for name in ("slots", "sums"):
        bank.add(name, runs / name / "adapter", check_base=False)
    with bank.use(names):
        free = write_answers(model, prompts, config, set(), follow=bank.follow)
    ends = {free[0][2], free[1][0], free[3][1]}
    with bank.use(names):
        together = write_answers(model, prompts, config, ends, follow=bank.follow)
    for prompt, name, expected in zip(prompts, names, together, strict=True):
        with bank.use([name]):
            assert write_answers(model, [prompt], config, ends, follow=bank.follow) == [expected]
    assert len({len(answer) for answer in together}) > 1


@pytest.mark.parametrize(
    "words, said",
    [
        (["many.runs=[nowhere]"], "nowhere/config.yaml: no such file"),
        (["--measure", "3", "a prompt"], "answers nothing"),
        (["many.unknown=x.txt", "a prompt"], "does nothing without many.measure"),
        (["many.encoder=/nowhere", "a prompt"], "/nowhere is neither a folder"),
    ],
)
def test_mistakes_are_one_line(runs, encoder, capsys, words, said):
    try:
        code = ask(runs, encoder, *words)
    except SystemExit as stop:  # found while the command line is read
        code = stop.code
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert code in (1, 2) and line.startswith("error: ") and said in line


def test_two_runs_of_one_name_and_another_base_are_refused(base, runs, encoder, tmp_path, capsys):
    other = shutil.copytree(base, tmp_path / "base2")
    assert train(other, tmp_path / "sums") == 0
    assert ask(runs, encoder, f"many.runs=[{tmp_path / 'sums'}]", "a prompt") == 2
    assert "has another base" in capsys.readouterr().err
    assert ask(runs, encoder, f"many.runs=[{runs / 'slots'}]", "a prompt") == 2
    assert "two runs are named slots" in capsys.readouterr().err
