"""Many adapters on one base: a mixed batch equals its rows one by one; adapters come and go; prompts find theirs."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from common.errors import ProjectError
from lora.adapters.files import load_adapter, save_adapter
from lora.adapters.inject import inject
from lora.adapters.multi import Bank, MultiLinear
from lora.adapters.quantize import QuantizedLinear, quantize_model
from lora.adapters.router import Router
from lora.settings import AdapterConfig
from tests.lora.tiny import TinyConv, output, randomise, tiny_gpt2, tiny_llama, tokens

ADAPTERS = {
    "plain": {"rank": 4},
    "wide": {"rank": 16, "rslora": True},
    "dora": {"rank": 3, "dora": True},
    "some": {"rank": 2, "targets": ("model.layers.1.mlp.up_proj",)},
    "pissa": {"rank": 4, "init": "pissa"},
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Saved adapters of different ranks, kinds and layers, for `tiny_llama()`."""
    root = tmp_path_factory.mktemp("adapters")
    for seed, (name, settings) in enumerate(ADAPTERS.items()):
        model = tiny_llama()
        inject(model, AdapterConfig(**settings))
        randomise(model, seed)
        save_adapter(model, root / name, "base")
    return {name: root / name for name in ADAPTERS}


def alone(folder, x):
    """What a model with only this adapter answers; without one, the base."""
    model = tiny_llama()
    if folder is not None:
        load_adapter(model, folder)
    return output(model, x)


def filled(folders, model=None):
    bank = Bank(model or tiny_llama())
    for name, folder in folders.items():
        bank.add(name, folder)
    return bank


@pytest.mark.parametrize(
    "names",
    [
        ["plain", "wide", "dora", "some", "pissa", "base"],
        ["dora", "base", "dora", "plain"],
        ["wide", "wide"],
        ["base", "base"],
        ["wide", "dora", "some"],  # slots in order, which need no copy
    ],
)
def test_a_mixed_batch_equals_its_rows_one_by_one(folders, names):
    bank = filled(folders)
    x = tokens(rows=len(names))
    with bank.use(names):
        mixed = output(bank.model, x)
    for row, name in enumerate(names):
        expected = alone(folders.get(name), x[row : row + 1])
        torch.testing.assert_close(mixed[row : row + 1], expected, rtol=1e-5, atol=2e-5)
    assert len({tuple(alone(folders.get(name), x[:1])[0, -1].tolist()) for name in names}) == len(set(names))


def test_outside_the_bank_is_the_base(folders):
    bank = filled(folders)
    x = tokens(rows=2)
    assert torch.equal(output(bank.model, x), output(tiny_llama(), x))
    with bank.use(["plain", "dora"]):
        inside = output(bank.model, x)
        with bank.use(["base", "plain"]):
            other = output(bank.model, x)
        assert torch.equal(output(bank.model, x), inside), "the outer names hold again"
    torch.testing.assert_close(other[1], alone(folders["plain"], x)[1], rtol=1e-5, atol=2e-5)
    assert torch.equal(output(bank.model, x), output(tiny_llama(), x))
    with pytest.raises(ZeroDivisionError), bank.use(["plain", "dora"]):
        _ = 1 / 0
    assert torch.equal(output(bank.model, x), output(tiny_llama(), x))


def test_adapters_come_and_go(folders):
    bank = Bank(tiny_llama())
    x = tokens(rows=2)
    bank.add("plain", folders["plain"])
    with bank.use(["plain", "base"]):
        before = output(bank.model, x)
        bank.add("wide", folders["wide"])  # while rows are being answered; a larger rank, new slots
        torch.testing.assert_close(output(bank.model, x), before, rtol=1e-6, atol=1e-6)
    bank.add("dora", folders["dora"])
    assert bank.names == ["plain", "wide", "dora"]
    bank.remove("plain")
    assert bank.names == ["wide", "dora"]
    bank.add("some", folders["some"])  # in the freed place, whose numbers must be gone
    with bank.use(["some", "dora"]):
        mixed = output(bank.model, x)
    for row, name in enumerate(["some", "dora"]):
        torch.testing.assert_close(mixed[row], alone(folders[name], x)[row], rtol=1e-5, atol=2e-5)
    bank.close()
    assert not any(isinstance(module, MultiLinear) for module in bank.model.modules())
    assert torch.equal(output(bank.model, x), output(tiny_llama(), x))


def test_a_removed_adapter_leaves_the_dora_of_others_alone(folders):
    bank = Bank(tiny_llama())
    x = tokens(rows=1)
    bank.add("dora", folders["dora"])
    bank.remove("dora")
    bank.add("plain", folders["plain"])
    with bank.use(["plain"]):
        torch.testing.assert_close(output(bank.model, x), alone(folders["plain"], x), rtol=1e-5, atol=2e-5)


def test_a_quantised_base_serves_many(folders):
    model = tiny_llama()
    quantize_model(model)
    bank = filled({name: folders[name] for name in ("plain", "some", "dora")}, copy.deepcopy(model))
    x = tokens(rows=3)
    with bank.use(["plain", "dora", "base"]):
        mixed = output(bank.model, x)
    for row, name in enumerate(["plain", "dora", "base"]):
        single = copy.deepcopy(model)
        if name != "base":
            load_adapter(single, folders[name])
        torch.testing.assert_close(mixed[row], output(single, x)[row], rtol=1e-5, atol=2e-5)
    assert any(isinstance(module, QuantizedLinear) for module in bank.model.modules())


def test_generation_with_a_cache_keeps_rows_apart(folders):
    bank = filled(folders)
    x = tokens(rows=3)
    settings = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    with bank.use(["plain", "base", "dora"]):
        mixed = bank.model.generate(x, attention_mask=torch.ones_like(x), **settings)
    for row, name in enumerate(["plain", "base", "dora"]):
        single = tiny_llama()
        if name != "base":
            load_adapter(single, folders[name])
        expected = single.generate(x[row : row + 1], attention_mask=torch.ones_like(x[:1]), **settings)
        assert mixed[row].tolist() == expected[0].tolist()


def test_layers_of_gpt2_and_half_precision(tmp_path):
    model = tiny_gpt2()
    inject(model, AdapterConfig(rank=4))
    randomise(model)
    save_adapter(model, tmp_path, "base")
    x = tokens(rows=2)
    for dtype, tolerance in ((torch.float32, 2e-5), (torch.bfloat16, 0.1)):
        bank = Bank(tiny_gpt2().to(dtype))
        bank.add("one", tmp_path)
        with bank.use(["one", "base"]):
            mixed = output(bank.model, x)
        assert mixed.dtype == dtype
        torch.testing.assert_close(mixed[0].float(), output(model, x)[0], rtol=tolerance, atol=tolerance)


def test_wrong_names_and_batches(folders):
    bank = filled({"plain": folders["plain"]})
    with pytest.raises(ProjectError, match="no adapter is named dora; there are: base, plain"), bank.use(["dora"]):
        pass
    with pytest.raises(ProjectError, match="named for 1 rows, and the batch has 2"), bank.use(["plain"]):
        output(bank.model, tokens(rows=2))
    with pytest.raises(ProjectError, match="no adapter is named dora"):
        bank.remove("dora")
    with pytest.raises(ProjectError, match="base cannot be removed"):
        bank.remove("base")
    for name in ("plain", "base"):
        with pytest.raises(ProjectError, match=r"named .* already"):
            bank.add(name, folders["dora"])
    with pytest.raises(ProjectError, match="another base"):
        Bank(tiny_llama(hidden=128)).add("plain", folders["plain"])
    adapted = tiny_llama()
    inject(adapted, AdapterConfig())
    with pytest.raises(ProjectError, match="adapters already"):
        Bank(adapted)


def test_adapters_that_cannot_share_a_base(tmp_path):
    model = TinyConv()
    inject(model, AdapterConfig(rank=2, targets=("conv",)))
    save_adapter(model, tmp_path / "conv", "base", None)
    with pytest.raises(ProjectError, match="linear layers, not Conv2d"):
        Bank(TinyConv()).add("conv", tmp_path / "conv")
    model = TinyConv()
    inject(model, AdapterConfig(rank=2, targets=("out",), head=("conv",)))
    save_adapter(model, tmp_path / "head", "base", None)
    bank = Bank(TinyConv())
    with pytest.raises(ProjectError, match="cannot share"):
        bank.add("head", tmp_path / "head")
    assert bank.names == []
    assert type(bank.model.out) is nn.Linear


# -- the router --------------------------------------------------------------------------------------------------------

TOPICS = {"sql": "select from table where", "weather": "rain sun cloud wind", "music": "song band guitar chord"}
WORDS = sorted({word for words in TOPICS.values() for word in words.split()} | {"the", "a", "of", "tax", "law"})


def bag_of_words(texts):
    """A stand-in for a sentence encoder: counts of words."""
    return torch.tensor([[text.split().count(word) + 0.01 for word in WORDS] for text in texts])


def prompts(topic, count, seed):
    rng = torch.Generator().manual_seed(seed)
    words = [*TOPICS[topic].split(), "the", "a", "of"]
    return [" ".join(words[i] for i in torch.randint(len(words), (8,), generator=rng)) for _ in range(count)]


@pytest.fixture
def router():
    made = Router(bag_of_words)
    for seed, topic in enumerate(TOPICS):
        made.add(topic, prompts(topic, 40, seed), prompts(topic, 40, 100 + seed))
    return made


def test_prompts_find_their_adapter(router):
    for seed, topic in enumerate(TOPICS):
        found = router.route(prompts(topic, 100, 1000 + seed))
        assert found.count(topic) >= 90
        assert set(found) <= {topic, "base"}


def test_unknown_prompts_go_to_the_base(router):
    assert router.route(["tax law tax law tax", "law law tax", "law tax law"]) == ["base"] * 3
    assert router.route([]) == []
    assert Router(bag_of_words).route(["rain"]) == ["base"]


def test_the_threshold_comes_from_held_out_prompts():
    own, held_out = prompts("sql", 40, 0), prompts("sql", 200, 1)
    for keep in (0.5, 0.9, 1.0):
        router = Router(bag_of_words)
        router.add("sql", own, held_out, keep)
        assert router.route(held_out).count("sql") == pytest.approx(keep * 200, abs=2)


def test_router_forgets(router):
    router.remove("music")
    assert "music" not in router.route(prompts("music", 20, 7))
    with pytest.raises(ProjectError, match="knows no music; it knows: sql, weather"):
        router.remove("music")
    with pytest.raises(ProjectError, match="held out"):
        router.add("music", ["song"], [])
    with pytest.raises(ProjectError, match="keep=2"):
        router.add("music", ["song"], ["band"], keep=2)


def test_routed_batch(folders, router):
    """From prompts to answers: each row by the adapter its prompt is for."""
    bank = Bank(tiny_llama())
    for topic, name in zip(TOPICS, ("plain", "wide", "dora")):
        bank.add(topic, folders[name])
    x = tokens(rows=3)
    names = router.route(["rain and sun and wind and cloud", "tax law", "song band guitar"])
    assert names == ["weather", "base", "music"]
    with bank.use(names):
        mixed = output(bank.model, x)
    torch.testing.assert_close(mixed[0], alone(folders["wide"], x)[0], rtol=1e-5, atol=2e-5)
    torch.testing.assert_close(mixed[1], alone(None, x)[1], rtol=1e-5, atol=2e-5)
    torch.testing.assert_close(mixed[2], alone(folders["dora"], x)[2], rtol=1e-5, atol=2e-5)
