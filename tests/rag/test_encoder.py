"""The encoder, and the loss it is trained with, against sentence-transformers and against longer ways."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch

from common.config import ConfigError
from common.errors import ProjectError
from common.pretrained import available
from rag.config import LossConfig, ModelConfig
from rag.model import loss as losses
from rag.model.encoder import build_model, build_tokenizer, fingerprint, load_tokenizer, mean_pool

MINILM = ModelConfig()
TEXTS = [
    "the cat sleeps", "a dog runs in the park", "birds fly", "fish swim in the sea all day long",
    "who sleeps?", "what runs?", "who can fly?", "where do fish swim?",
]  # fmt: skip
SMALL = ModelConfig(name="scratch", vocabulary=400, width=16, layers=2, heads=2, query_length=16, passage_length=24)
needs_minilm = pytest.mark.skipif(not available(MINILM.name), reason="all-MiniLM-L6-v2 is not here: make offline")


@pytest.fixture(scope="module")
def small():
    """A tokenizer and a seeded model in float64, dropout on."""
    tokenizer = build_tokenizer(SMALL, TEXTS * 5)
    torch.manual_seed(0)
    return tokenizer, build_model(SMALL, len(tokenizer.inner)).double()


@needs_minilm
def test_equals_sentence_transformers():
    peers = pytest.importorskip("sentence_transformers")
    from common.pretrained import find

    tokenizer = build_tokenizer(MINILM)
    model = build_model(MINILM, 0).eval()
    with torch.no_grad():
        ours = model(tokenizer.passages(TEXTS))
    peer = peers.SentenceTransformer(str(find(MINILM.name)), device="cpu")
    theirs = torch.from_numpy(peer.encode(TEXTS, normalize_embeddings=True))
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


def test_the_loss_equals_sentence_transformers():
    """MultipleNegativesRankingLoss on the same vectors, with a hard negative each; loss and gradients."""
    module = pytest.importorskip("sentence_transformers.losses")
    torch.manual_seed(0)
    raw = torch.randn(3, 5, 8, dtype=torch.float64, requires_grad=True)  # questions, passages, negatives
    unit = torch.nn.functional.normalize(raw, dim=2)
    ours = losses.contrastive_loss(
        unit[0], torch.cat([unit[1], unit[2]]), torch.arange(5), torch.ones(5, 10, dtype=torch.bool),
        LossConfig(temperature=0.05),
    )  # fmt: skip
    (mine,) = torch.autograd.grad(ours.loss, raw, retain_graph=True)
    peer = module.MultipleNegativesRankingLoss(torch.nn.Identity(), scale=20.0)
    theirs = peer.compute_loss_from_embeddings([raw[0], raw[1], raw[2]], None)
    (other,) = torch.autograd.grad(theirs, raw)
    torch.testing.assert_close(ours.loss, theirs)
    torch.testing.assert_close(mine, other)


def test_false_negatives_do_not_count():
    """Of four candidates the third is another question's passage that answers this one, too."""
    allowed = losses.wrong_candidates([[7, 9], [8]], [7, 8, 9, 7])
    assert allowed.tolist() == [[False, True, False, False], [True, False, True, True]]
    unit = torch.nn.functional.normalize(torch.randn(6, 4), dim=1)
    q, c = unit[:2], unit[2:]
    got = losses.contrastive_loss(q, c, torch.tensor([0, 1]), allowed, LossConfig(temperature=1.0)).loss
    first = -torch.log_softmax((q[0] @ c.T)[[0, 1]], 0)[0]
    second = -torch.log_softmax((q[1] @ c.T)[[1, 0, 2, 3]], 0)[0]
    torch.testing.assert_close(got, (first + second) / 2)


def test_the_margin_leaves_out_what_is_too_near():
    q = torch.tensor([[1.0, 0.0]])
    c = torch.tensor([[0.6, 0.8], [1.0, 0.0], [0.0, 1.0]])
    every = torch.ones(1, 3, dtype=torch.bool)
    right = torch.tensor([0])
    near = losses.contrastive_loss(q, c, right, every, LossConfig(temperature=1.0, margin=0.1)).loss
    torch.testing.assert_close(near, -torch.log_softmax(torch.tensor([0.6, 0.0]), 0)[0])


def test_symmetric_loss():
    torch.manual_seed(0)
    unit = torch.nn.functional.normalize(torch.randn(6, 4), dim=1)
    every = torch.ones(3, 3, dtype=torch.bool)
    both = losses.contrastive_loss(unit[:3], unit[3:], torch.arange(3), every, LossConfig(symmetric=True)).loss
    there = losses.contrastive_loss(unit[:3], unit[3:], torch.arange(3), every, LossConfig()).loss
    back = losses.contrastive_loss(unit[3:], unit[:3], torch.arange(3), every, LossConfig()).loss
    torch.testing.assert_close(both, (there + back) / 2)


def backward(model, chunks, places: torch.Tensor, at_once: bool) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Loss and gradients of four questions and their passages."""
    model.zero_grad()

    def loss_of(vectors: torch.Tensor) -> losses.Contrast:
        q, c = vectors[0].split([4, 4])
        return losses.contrastive_loss(q, c, torch.arange(4), torch.ones(4, 4, dtype=torch.bool), LossConfig())

    result = losses.backward_in_chunks(model, chunks, places, loss_of, lambda x: x, nullcontext, at_once)
    return result.loss, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def gradients(tokenizer, model, chunk: int, at_once: bool) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    torch.manual_seed(5)
    model.train()
    questions = [tokenizer.questions(TEXTS[i : i + chunk]) for i in range(4, 8, chunk)]
    passages = [tokenizer.passages(TEXTS[i : i + chunk]) for i in range(0, 4, chunk)]
    return backward(model, questions + passages, torch.arange(8), at_once)


@pytest.mark.parametrize("at_once", [True, False])
def test_texts_may_be_encoded_in_any_order(small, at_once):
    tokenizer, model = small
    model.eval()
    texts = [tokenizer.passages([text]) for text in [*TEXTS[4:8], *TEXTS[:4]]]
    order = [6, 2, 0, 7, 1, 3, 5, 4]
    expected_loss, expected = backward(model, texts, torch.arange(8), at_once)
    loss, found = backward(model, [texts[place] for place in order], torch.tensor(order), at_once)
    torch.testing.assert_close(loss, expected_loss, atol=1e-12, rtol=1e-10)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, atol=1e-10, rtol=1e-8)


@pytest.mark.parametrize("chunk", [4, 2, 1])
def test_the_gradient_cache_is_exact(small, chunk):
    """Twice through the network chunk by chunk, or once with the whole graph: the same loss and gradients, under
    dropout.
    """
    tokenizer, model = small
    expected_loss, expected = gradients(tokenizer, model, chunk, at_once=True)
    loss, found = gradients(tokenizer, model, chunk, at_once=False)
    assert expected and loss == expected_loss
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, atol=1e-12, rtol=1e-10)


def test_the_gradient_cache_needs_its_random_numbers(small, monkeypatch):
    """Without the states put back the second pass has another dropout, and the gradients are wrong."""
    tokenizer, model = small
    _, expected = gradients(tokenizer, model, 2, at_once=True)
    monkeypatch.setattr(losses, "set_random_state", lambda *_: None)
    _, found = gradients(tokenizer, model, 2, at_once=False)
    assert any(not torch.allclose(found[name], value) for name, value in expected.items())


def test_padding_changes_nothing(small):
    """Neither mean nor network sees how long the other texts of a batch are."""
    tokenizer, model = small
    model.eval()
    with torch.no_grad():
        together = model(tokenizer.passages(TEXTS))
        alone = torch.cat([model(tokenizer.passages([text])) for text in TEXTS])
    torch.testing.assert_close(together, alone, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(together.norm(dim=1), torch.ones(8))
    states = torch.tensor([[[1.0], [3.0], [100.0]]])
    assert mean_pool(states, torch.tensor([[1, 1, 0]])).item() == 2


def test_the_cut_of_a_pair_never_takes_the_question(small):
    tokenizer, _ = small
    tokens = tokenizer.pairs(["where do fish swim?"], ["fish swim " * 100])
    text = tokenizer.inner.decode(tokens["input_ids"][0])
    assert "where do fish swim?" in text.replace(" ?", "?")
    assert tokens["input_ids"].shape[1] == 16 + 24
    tokens = tokenizer.pairs(["who " * 200], ["birds fly"])
    assert "birds fly" in tokenizer.inner.decode(tokens["input_ids"][0])
    assert tokens["token_type_ids"].max() == 1


def test_word_pieces_are_the_same_each_time(small):
    learned = [build_tokenizer(SMALL, TEXTS * 5).inner.get_vocab() for _ in range(3)]
    assert learned[0] == learned[1] == learned[2] and len(learned[0]) > 261
    text = "Naïve ÅNGSTRÖM 日本?"
    ids = small[0].inner(text)["input_ids"]
    assert small[0].inner.decode(ids, skip_special_tokens=True).strip() == text.lower()


def test_a_cross_encoder_and_its_loss(small):
    tokenizer, _ = small
    model = build_model(ModelConfig(**{**SMALL.__dict__, "kind": "cross_encoder"}), len(tokenizer.inner))
    scores = model(tokenizer.pairs([TEXTS[4], TEXTS[4]], TEXTS[:2]))
    assert scores.shape == (2, 1)
    fixed = torch.tensor([[2.0], [1.0], [0.0], [3.0]])
    result = losses.list_loss(fixed, 2)
    expected = -(torch.tensor([1.0]).sigmoid().log() + torch.tensor([-3.0]).sigmoid().log()) / 2
    torch.testing.assert_close(result.loss, expected[0])
    assert result.accuracy == 0.5


@pytest.mark.parametrize("model", [SMALL, pytest.param(MINILM, marks=needs_minilm)], ids=["scratch", "minilm"])
def test_attention_as_the_formula_is_printed(small, model, monkeypatch):
    """The same vectors and gradients by both kernels, with padding; the fused one is called by its setting alone."""
    tokenizer = small[0] if model is SMALL else build_tokenizer(model)
    calls = []
    kernel = torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(
        torch.nn.functional, "scaled_dot_product_attention", lambda *a, **k: calls.append(1) or kernel(*a, **k)
    )
    found = {}
    for name in ("fused", "written"):
        torch.manual_seed(0)
        net = build_model(replace(model, dropout=0.0, attention_kernel=name), len(tokenizer.inner)).double()
        vectors = net(tokenizer.passages(TEXTS))
        gradients = torch.autograd.grad((vectors @ vectors.T).logsumexp(1).sum(), list(net.parameters()))
        found[name] = [vectors, *gradients]
        assert bool(calls) == (name == "fused")
        calls.clear()
    for fused, written in zip(found["fused"], found["written"], strict=True):
        torch.testing.assert_close(fused, written, atol=1e-9, rtol=1e-7)


def test_fingerprints(small):
    tokenizer, model = small
    same = fingerprint(model, SMALL)
    assert same == fingerprint(model, ModelConfig(**{**SMALL.__dict__, "vocabulary": 500}))
    assert same != fingerprint(model, ModelConfig(**{**SMALL.__dict__, "query_prefix": "query: "}))
    other = build_model(SMALL, len(tokenizer.inner))
    assert same != fingerprint(other, SMALL)


def test_what_is_no_encoder_is_refused(tmp_path, small):
    with pytest.raises(ProjectError, match="no tokenizer that can be read"):
        load_tokenizer(tmp_path, SMALL)
    small[0].save(tmp_path)
    with pytest.raises(ConfigError, match="600 tokens are more than the 512"):
        load_tokenizer(tmp_path, ModelConfig(name="x", passage_length=600))
    loaded = load_tokenizer(tmp_path, SMALL)
    assert loaded.questions(TEXTS)["input_ids"].tolist() == small[0].questions(TEXTS)["input_ids"].tolist()
    (tmp_path / "config.json").write_text('{"model_type": "t5", "d_model": 8}')
    with pytest.raises(ProjectError, match=r"no encoder|cannot be read"):
        build_model(ModelConfig(name=str(tmp_path)), 0)
