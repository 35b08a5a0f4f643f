"""Learning to read: what is drawn, that a tree's loss is that of its prompts, and a run that stops and goes on."""

from __future__ import annotations

import re
from dataclasses import replace

import numpy as np
import pytest
import torch

import rag.train
from common.checkpoint import Checkpoints
from common.config import ConfigError, Options, load, resolve
from common.errors import ProjectError
from common.logging import read_metrics
from common.run import Run
from rag.config import Config, SearchConfig
from rag.data import load_collection
from rag.data.corpus import Collection, Passage, Passages, Question
from rag.metrics.scores import answer_at
from rag.reader.examples import Contexts, has_answer, window, worked_examples
from rag.reader.finetune import Batches, LanguageModelTask, trained
from rag.reader.tree import NONE
from rag.reader.weights import open_reader, read_adapter
from rag.search.analyser import Analyser
from rag.search.bm25 import BM25
from rag.search.retriever import Retriever
from rag.settings import ReaderConfig
from rag.train_reader import open_search, train
from tests.helpers import status
from tests.rag import tiny_lm

TINY = [
    "data.entities=60",
    "reader.answer_tokens=8",
    "reader_train.batch_size=3",
    "reader_train.steps=4",
    "reader_train.rank=2",
    "reader_train.log_every=1",
    "reader_train.save_every=2",
    "reader_train.lr=1e-2",
    "device=cpu",
    "precision=fp32",
]


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    return tiny_lm.save(tmp_path_factory.mktemp("lm"))


@pytest.fixture
def config(model_folder, tmp_path):
    return resolve(Config, None, [*TINY, f"reader.model={model_folder}", f"run_dir={tmp_path / 'run'}"])


@pytest.fixture(scope="module")
def world():
    config = resolve(Config, None, TINY)
    collection = load_collection(config.data, "data")
    bm25 = BM25(config.bm25, Analyser(config.analyser))
    bm25.add(passage.whole for passage in collection.passages)
    return collection, Retriever(collection.passages, SearchConfig(mode="bm25"), bm25)


# -- what is drawn -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("complete", [False, True])
def test_contexts(world, config, complete):
    """Where not every passage has been judged, none of the others may have the answer's words."""
    collection, retriever = world
    collection = replace(collection, complete=complete)
    contexts = Contexts(collection, retriever, config)
    assert sum(len(group) for group in contexts.groups) == len(collection.train)
    by_text = {question.text: question for question in collection.train}
    right = missing = misleading = 0
    places = set()
    for index in range(len(contexts)):
        context = contexts.draw(0, index)
        assert 1 <= len(context.passages) <= 2 and len(context.asked) <= config.reader_train.questions
        for asked in context.asked:
            question = by_text[asked.question]
            ids = [context.passages[place].id for place in asked.sources]
            assert sorted(ids) == sorted(question.relevant) * bool(ids)
            if asked.sources:
                assert asked.answer in question.answers
                right += 1
                places.update(asked.sources)
            else:
                assert not asked.answer
                words = answer_at([p.whole for p in context.passages], question.answers, 2)
                assert complete or not words
                misleading += words
                missing += 1
    assert places == {0, 1}, "the right passage must not stand in one place only"
    assert 0.12 < missing / (right + missing) < 0.4
    assert (misleading > 0) == complete


def test_a_first_step_without_the_second_is_no_answer(world, config):
    """Of a question that needs two passages, the one that names the other may be shown alone; the answer is missing."""
    collection, retriever = world
    contexts = Contexts(collection, retriever, config)
    by_text = {question.text: question for question in collection.train}
    seen = {"first step": 0, "nothing": 0}
    for epoch in range(4):
        for index in range(len(contexts)):
            context = contexts.draw(epoch, index)
            for asked in context.asked:
                question = by_text[asked.question]
                if question.kind == "two_hop" and not asked.sources:
                    shown = {passage.id for passage in context.passages} & set(question.relevant)
                    assert not asked.answer and len(shown) <= 1
                    seen["first step" if shown else "nothing"] += 1
                elif question.kind == "one_hop" and not asked.sources:
                    assert not {passage.id for passage in context.passages} & set(question.relevant)
    assert min(seen.values()) > 5 and 0.3 < seen["first step"] / sum(seen.values()) < 0.9


def test_sources_come_in_the_order_in_which_they_are_read(world, config):
    """The passage that names the other first, the one with the answer last, wherever they stand."""
    collection, retriever = world
    contexts = Contexts(collection, retriever, config)
    by_text = {question.text: question for question in collection.train}
    orders = set()
    for index in range(len(contexts)):
        context = contexts.draw(0, index)
        for asked in context.asked:
            if len(asked.sources) == 2:
                assert [context.passages[i].id for i in asked.sources] == by_text[asked.question].relevant
                assert has_answer(context.passages[asked.sources[-1]], by_text[asked.question])
                orders.add(asked.sources)
    assert orders == {(0, 1), (1, 0)}


def test_what_looks_alike_is_what_the_readers_own_search_finds(world, config):
    """Asked for a year of birth, a search of two steps finds the birthplace, too, which has a year of its own."""
    collection, retriever = world
    asked = [q for q in collection.train if q.kind == "one_hop" and re.fullmatch(r"person-\d+-0", q.relevant[0])]
    asked = [q for q in asked if retriever.search([q.text], 1)[0][0].passage.id in q.relevant]
    assert len(asked) > 10
    towns = {p.title for p in collection.passages if p.id.startswith("place")}
    with_place = {}
    for hops in (1, 2):
        searched = Retriever(collection.passages, SearchConfig(mode="bm25", hops=hops), retriever.lexical)
        contexts = Contexts(collection, searched, config)
        with_place[hops] = 0.0
        for question in asked:
            right, others = contexts.candidates(question)
            assert [passage.id for passage in right] == question.relevant and right[0] not in others
            behind = [p for p in others[:3] if p.title in towns and p.title in right[0].text]
            with_place[hops] += len(behind[:1]) / len(asked)
    assert with_place[2] > 0.25, with_place
    assert with_place[2] > 1.5 * with_place[1] > 0, with_place


def test_a_context_is_what_the_search_would_show(world, config):
    """Where the others are the search's: the right passages and the best others, none left out between them."""
    collection, retriever = world
    settings = replace(config.reader_train, others="search", passages=3, fewest=3, depth=6, unanswerable=0.0)
    contexts = Contexts(collection, retriever, replace(config, reader_train=settings))
    by_text = {question.text: question for question in collection.train}
    orders = set()
    for index in range(60):
        context = contexts.draw(0, index)
        right, others = contexts.candidates(by_text[context.asked[0].question])
        shown = [*right, *others][:3]
        assert sorted(p.id for p in context.passages) == sorted(p.id for p in shown)
        orders.add(tuple(shown.index(passage) for passage in context.passages))
    assert len({order for order in orders if len(order) == 3}) == 6, "their places are drawn"


def test_fewest_passages(world, config):
    collection, retriever = world
    settings = replace(config.reader_train, fewest=3, passages=3)
    contexts = Contexts(collection, retriever, replace(config, reader_train=settings))
    assert {len(contexts.draw(0, index).passages) for index in range(40)} == {3}


def test_further_questions_are_about_what_else_is_shown_or_looks_alike(world, config):
    collection, retriever = world
    collection = replace(collection, complete=False)
    settings = replace(config, reader_train=replace(config.reader_train, further=4, passages=3, fewest=3))
    plain = replace(settings, reader_train=replace(settings.reader_train, further=0))
    contexts, before = Contexts(collection, retriever, settings), Contexts(collection, retriever, plain)
    by_text = {question.text: question for question in collection.train}
    seen = {"answered": 0, "open": 0}
    for index in range(len(contexts)):
        context, same = contexts.draw(0, index), before.draw(0, index)
        assert context.passages == same.passages and context.asked[: len(same.asked)] == same.asked
        further = context.asked[len(same.asked) :]
        assert len(further) <= 4 and len({asked.question for asked in context.asked}) == len(context.asked)
        for asked in further:
            question = by_text[asked.question]
            ids = [context.passages[place].id for place in asked.sources]
            if asked.answer:
                assert sorted(ids) == sorted(question.relevant) and asked.answer in question.answers
            else:
                assert not ids and not {*question.relevant} <= {passage.id for passage in context.passages}
                assert not answer_at([p.whole for p in context.passages], question.answers, 3)
            seen["answered" if asked.answer else "open"] += 1
    assert min(seen.values()) > 0.7 * max(seen.values()) and sum(seen.values()) > 2 * len(contexts)


def test_contexts_are_a_function_of_seed_epoch_and_place(world, config):
    collection, retriever = world
    one, other = Contexts(collection, retriever, config), Contexts(collection, retriever, config)
    assert [one.draw(1, i) for i in range(6)] == [other.draw(1, i) for i in reversed(range(6))][::-1]
    assert [one.draw(1, i) for i in range(6)] != [one.draw(2, i) for i in range(6)]
    assert sorted(one.order(0)) == list(range(len(one))) and one.order(0) != one.order(1)
    other = Contexts(collection, retriever, replace(config, seed=1))
    assert one.order(0) != other.order(0)


def test_a_window_has_the_answer_wherever_it_stands():
    text = " ".join(f"w{i}" for i in range(50))
    starts = set()
    for seed in range(200):
        cut = window(text, ["w20 w21"], 10, np.random.default_rng(seed))
        assert len(cut.split()) == 10 and "w20 w21" in cut and cut in text
        starts.add(cut.split()[0])
    assert starts == {f"w{i}" for i in range(12, 21)}
    for answer in ("w0", "w49", "absent"):
        cut = window(text, [answer], 10, np.random.default_rng(0))
        assert len(cut.split()) == 10 and (answer in cut.split() or answer == "absent")
    assert window(text, ["w3"], 0, np.random.default_rng(0)) == text
    long = " ".join(f"w{i}" for i in range(5, 40))
    assert window(text, [long], 10, np.random.default_rng(0)) in text


def test_questions_without_judged_passages_learn_from_the_best_that_has_the_answer(world, config):
    collection, retriever = world
    bare = [replace(question, gold={}) for question in collection.train[:40]]
    contexts = Contexts(replace(collection, train=bare), retriever, config)
    assert len(contexts) == 40
    sources = [asked.sources for i in range(40) for asked in contexts.draw(0, i).asked]
    assert sum(bool(found) for found in sources) > 10
    with pytest.raises(ProjectError, match="no training questions"):
        Contexts(replace(collection, train=[]), retriever, config)


def test_worked_examples_are_training_questions(world, config):
    collection, _ = world
    config = replace(config, reader=replace(config.reader, examples=4))
    examples = worked_examples(collection, config)
    asked = {question.text for question in collection.train}
    tested = {question.text for split in ("validation", "test") for question in collection.questions(split)}
    assert len(examples) == 4 and {example.question for example in examples} <= asked - tested
    for example in examples:
        (place,) = example.sources
        assert example.answer in example.passages[place].text
        assert not any(example.answer in p.text for i, p in enumerate(example.passages) if i != place)
    assert {example.sources for example in examples} == {(0,), (1,)}
    assert worked_examples(Collection("mine", Passages([Passage("a", "b")])), config)[0].question.startswith("When")


# -- rows --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cite", ["auto", "first"])
def test_a_row_is_the_prompt_that_the_reader_will_see(world, config, cite):
    collection, retriever = world
    config = replace(config, reader=replace(config.reader, cite=cite))
    with Run(config, Options("train")) as run:
        task = LanguageModelTask(config, run)
        contexts = Contexts(collection, retriever, config)
        reader = task.reader()
        for index in range(12):
            context = contexts.draw(0, index)
            tree = task.row(context)
            answers = "".join(task.tokenizer.decode([t for t in tree.targets if t != NONE])).split("\n")[:-1]
            assert len(answers) == len(context.asked)
            for branch, (asked, answer) in enumerate(zip(context.asked, answers), start=1):
                prompt = reader.prompter.build(asked.question, context.passages)
                at = [i for i, number in enumerate(tree.branches) if number in (0, branch)]
                whole = reader.prompter.prefix + prompt.ids
                assert [tree.ids[i] for i in at][: len(whole)] == whole
                said = asked.answer or "unknown"
                before = "".join(f" [{place + 1}]" for place in asked.sources) if cite == "first" else ""
                behind = "" if cite == "first" else "".join(f" [{place + 1}]" for place in sorted(asked.sources))
                assert answer == f"{before} {said}{behind}"


# -- training ----------------------------------------------------------------------------------------------------------


def test_it_learns_one_batch_by_heart(world, config):
    collection, retriever = world
    config = replace(config, reader_train=replace(config.reader_train, rank=16, batch_size=1, window=20))
    with Run(config, Options("train")) as run:
        task = LanguageModelTask(config, run)
        batch = Batches(task, Contexts(collection, retriever, config), config).at(1)
        optimizer = torch.optim.Adam(trained(task.model), 1e-2)
        losses = []
        for _ in range(60):
            optimizer.zero_grad()
            loss = task.loss(task.model, batch)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    assert losses[0] > 4 and losses[-1] < 0.5, losses[::6]


def test_batches_have_similar_lengths_and_every_context(world, config):
    collection, retriever = world
    with Run(config, Options("train")) as run:
        task = LanguageModelTask(config, run)
    contexts = Contexts(collection, retriever, config)
    batches = Batches(task, contexts, config)
    rows = [row for window in range(-(-batches.per_epoch // 16)) for rows in batches.plan(0, window) for row in rows]
    assert len(rows) >= 0.9 * batches.per_epoch * 3
    spread = [max(len(t.ids) for t in rows) - min(len(t.ids) for t in rows) for rows in batches.plan(0, 0)]
    lengths = [len(tree.ids) for rows in batches.plan(0, 0) for tree in rows]
    assert np.mean(spread) < 0.3 * (max(lengths) - min(lengths))


def test_a_run_goes_on_exactly(config, tmp_path):
    def run(name, *stages):
        for number, steps in enumerate(stages):
            settings = replace(config.reader_train, steps=steps, decay="constant", warmup=0, dropout=0.1)
            this = replace(config, run_dir=str(tmp_path / name), reader_train=settings)
            assert status(train, this, Options("train", resume=number > 0)) == 0
        folder = tmp_path / name / "reader"
        rows = [
            {key: value for key, value in row.items() if not key.endswith("_per_second") and key != "time"}
            for row in read_metrics(folder / "metrics.jsonl")
        ]
        return Checkpoints(folder / "checkpoints").load_newest(), rows, folder

    whole, lines, folder = run("whole", 4)
    parts, again, _ = run("parts", 1, 3, 4)
    assert set(whole["parts"]["model"]) == set(parts["parts"]["model"]) and whole["step"] == 4
    for name, tensor in whole["parts"]["model"].items():
        assert torch.equal(tensor, parts["parts"]["model"][name]), name
    assert all("lora" in name for name in whole["parts"]["model"]), "only the adapter is kept"
    assert [line["loss"] for line in lines] == [line["loss"] for line in again]
    size = sum(path.stat().st_size for path in (folder / "adapter").iterdir())
    assert size < 200_000 and (folder / "adapter/adapter_model.safetensors").is_file()


@pytest.mark.slow  # the compiler takes a minute
def test_compiled_layers_learn_the_same(config, tmp_path):
    """Layer by layer; validation, whose shapes are others, is not compiled."""
    settings = replace(config.reader_train, steps=2, warmup=0, validate_every=2, validation_questions=3)
    found = []
    for name in ("plain", "compiled"):
        this = replace(config, run_dir=str(tmp_path / name), reader_train=settings, compile=name == "compiled")
        assert status(train, this, Options("train")) == 0
        found.append(Checkpoints(tmp_path / name / "reader/checkpoints").load_newest()["parts"]["model"])
    for name, tensor in found[0].items():
        torch.testing.assert_close(found[1][name], tensor, atol=1e-5, rtol=1e-4, msg=name)


def test_a_finetuned_reader_is_used_as_it_was_trained(config, tmp_path):
    settings = replace(config.reader_train, steps=1, decay="constant", validate_every=1, validation_questions=3)
    config = replace(config, reader_train=settings)
    config = replace(config, reader=replace(config.reader, abstain="nothing"))
    assert status(train, config, Options("train")) == 0
    (row,) = read_metrics(tmp_path / "run/reader/metrics.jsonl")
    assert 0 <= row["val_em"] <= row["val_f1"] <= 1
    asked = replace(config, reader=ReaderConfig(model="elsewhere", passages=1, answer_tokens=5))
    reader, name = open_reader(asked, torch.device("cpu"), torch.float32)
    assert "finetuned" in name and reader.config.abstain == "nothing" and reader.config.passages == 1
    base = tiny_lm.llama()
    merged = reader.decoder.model
    assert not torch.equal(base.model.layers[0].mlp.up_proj.weight, merged.model.layers[0].mlp.up_proj.weight)
    assert torch.equal(base.lm_head.weight, merged.lm_head.weight)
    assert reader.answer(["Who?"], [[Passage("a", "Mira Tolle.")]])[0].passages


def test_training_may_begin_with_another_reader(config, tmp_path, capsys):
    def run(name, **settings):
        this = replace(config, run_dir=str(tmp_path / name), reader_train=replace(config.reader_train, **settings))
        return status(train, this, Options("train"))

    assert run("first", steps=2) == 0
    first = str(tmp_path / "first")
    assert run("second", steps=1, lr=1e-12, decay="constant", warmup=0, start=first) == 0
    one, other = read_adapter(first), read_adapter(str(tmp_path / "second/reader"))
    assert set(one) == set(other) and any(tensor.abs().max() > 1e-3 for name, tensor in one.items() if "lora_B" in name)
    for name, tensor in one.items():
        torch.testing.assert_close(other[name], tensor, atol=1e-9, rtol=0)
    assert run("third", steps=1, start=first, rank=3) == 2
    assert "reader_train.rank" in capsys.readouterr().err and not (tmp_path / "third/reader/adapter").exists()
    assert run("fourth", steps=1, start=str(tmp_path)) == 2
    assert "holds no finetuned language model" in capsys.readouterr().err and not (tmp_path / "fourth").exists()


def test_peoples_mistakes(config, capsys):
    assert status(train, replace(config, reader=replace(config.reader, neutralise=False)), Options("train")) == 2
    assert "reader.neutralise" in capsys.readouterr().err
    assert status(train, config, Options("train", dry_run=True)) == 0
    assert "contexts" in capsys.readouterr().out
    with pytest.raises(ConfigError, match="window"):
        resolve(Config, None, ["reader_train.window=5"])


def test_a_reader_learns_among_what_its_own_search_finds(config, tmp_path, capsys):
    small = [*TINY, "model.name=scratch", "model.width=16", "model.layers=1", "model.heads=2", "model.vocabulary=400"]
    settings = ["train.steps=2", "train.batch_size=8", "reader_train.others=search", "search.hops=2"]
    config = resolve(
        Config, None, [*small, *settings, f"reader.model={config.reader.model}", f"run_dir={tmp_path}/run"]
    )
    assert status(train, config, Options("train")) == 2
    assert "rag.train" in capsys.readouterr().err and not (tmp_path / "run").exists()
    assert status(train, config, Options("train", dry_run=True)) == 0
    assert status(rag.train.train, config, Options("train")) == 0
    collection = load_collection(config.data, "data")
    searched = Contexts(collection, open_search(config, collection), config)
    words = replace(config, reader_train=replace(config.reader_train, others="words"))
    plain = Contexts(collection, open_search(words, collection), config)
    assert searched.retriever.config.mode == "hybrid" and plain.retriever.config.mode == "bm25"
    assert [searched.draw(0, i) for i in range(9)] != [plain.draw(0, i) for i in range(9)]
    assert [searched.draw(0, i) for i in range(9)] == [searched.draw(0, i) for i in reversed(range(9))][::-1]
    assert "no finished training" not in capsys.readouterr().err
    open_search(replace(config, train=replace(config.train, steps=4)), collection)
    assert "the weights are of step 2 of 4: no finished training" in capsys.readouterr().err
    assert status(train, config, Options("train")) == 0
    assert (tmp_path / "run/reader/adapter/adapter_config.json").is_file()


def test_the_help_names_the_program(capsys):
    with pytest.raises(SystemExit):
        load(Config, "rag", "train", ["--help"], program="train_reader")
    assert "python -m rag.train_reader" in capsys.readouterr().out


def test_encoder_decoders_are_refused(config, tmp_path, capsys):
    folder = tiny_lm.save(tmp_path / "t5", tiny_lm.t5())
    assert status(train, replace(config, reader=replace(config.reader, model=str(folder))), Options("train")) == 2
    assert "decoder-only" in capsys.readouterr().err
    assert Question("a", "b").relevant == []
