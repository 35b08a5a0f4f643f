"""The page: what it shows, what it lets no document do, and who is let in."""

from __future__ import annotations

import re
import socket
from html.parser import HTMLParser

import pytest

from common.config import Options
from rag.config import Config, ServeConfig
from rag.data.corpus import Passage, Passages
from rag.reader.pipeline import Pipeline
from rag.reader.reader import Answer
from rag.serve import build_app, main
from tests.helpers import status

httpx = pytest.importorskip("httpx", reason="pip install httpx")
from fastapi.testclient import TestClient  # noqa: E402 (needs httpx)

EVIL = '<script>alert(1)</script><img src=http://evil.example/x onerror=alert(1)> It was Ada &amp; "Eve".'
PASSAGES = (Passage("a<b>.txt#1", EVIL, "<h1>Title</h1>"), Passage("c", "Nothing here."))


class Fixed:
    """A retriever and a reader that say the same."""

    answer_ = Answer("Ada <i>&", PASSAGES, (0,), 0.7)
    passages = Passages(PASSAGES)

    def __init__(self):
        self.seconds = {"prompt": 0.0, "read": 0.1, "write": 0.2}

    def find(self, questions, k):
        from numpy import array

        class Found:
            rows = array([[0, 1, -1]])

        return Found()

    def stream(self, question, passages):
        assert passages == list(PASSAGES)
        yield self.answer_.text
        yield self.answer_


def client(threshold=0.0, host="127.0.0.1", base="http://127.0.0.1:8000"):
    pipeline = Pipeline(Fixed(), Fixed(), 3, threshold, "a <reader>")
    return TestClient(build_app(pipeline, ServeConfig(host=host, longest_question=50), "my & notes"), base_url=base)


class Tags(HTMLParser):
    """The tags of a page, and what their attributes load."""

    def __init__(self, page):
        super().__init__()
        self.tags, self.loads, self.text = [], [], []
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.loads += [(name, value) for name, value in attributes if name in ("src", "href") or name.startswith("on")]

    def handle_data(self, data):
        self.text.append(data)


def test_the_empty_page():
    page = client().get("/")
    assert page.status_code == 200 and "Ask a question" in page.text and "<li" not in page.text
    assert "my &amp; notes" in page.text


def test_an_answer_with_its_sources():
    page = client().get("/", params={"q": 'Who "was" <it>?'})
    found = Tags(page.text)
    assert page.status_code == 200 and page.text.count("<li") == 2
    assert not {"script", "img", "i", "link", "iframe"} & set(found.tags) and found.loads == []
    assert found.tags.count("h1") == 1
    text = "".join(found.text)
    assert EVIL in text and "Ada <i>&" in text and "a <reader>" in text and "<h1>Title</h1>" in text
    assert 'value="Who &#34;was&#34; &lt;it&gt;?"' in page.text
    assert "cited" in text and "read 0.0 ms" in text


def test_the_answer_is_marked_in_its_source(monkeypatch):
    monkeypatch.setattr(Fixed, "answer_", Answer("ada", PASSAGES, (0,), 0.7))
    assert re.findall(r"<mark>(.*?)</mark>", client().get("/", params={"q": "Who?"}).text) == ["Ada"]


def test_withheld():
    page = client(threshold=0.9).get("/", params={"q": "Who?"}).text
    assert "do not seem to say" in page and "A guess" in page and "<mark>" not in page
    reply = client(threshold=0.9).post("/api/answer", json={"question": "Who?"}).json()
    assert reply["withheld"] and reply["answer"] == ""


def test_for_programs():
    reply = client().post("/api/answer", json={"question": "Who?"})
    assert reply.status_code == 200
    body = reply.json()
    assert body["answer"] == "Ada <i>&" and body["confidence"] == 0.7
    assert [source["cited"] for source in body["sources"]] == [True, False]
    assert body["sources"][0]["text"] == EVIL
    for broken in ({}, {"question": " "}, {"question": "x" * 51}, {"question": 3}):
        assert client().post("/api/answer", json=broken).status_code in (400, 422)
    page = client().get("/", params={"q": "x" * 51})
    assert page.status_code == 400 and "at most 50" in page.text


def test_nothing_else_is_loaded_or_let_in():
    page = client().get("/", params={"q": "Who?"})
    policy = page.headers["content-security-policy"]
    assert "default-src 'none'" in policy and "script" not in policy
    assert page.headers["x-content-type-options"] == "nosniff"
    assert client(base="http://evil.example").get("/").status_code == 400
    assert client(base="http://localhost:8000").get("/").status_code == 200
    assert client(host="0.0.0.0", base="http://pc.example").get("/").status_code == 200
    assert client().get("/docs").status_code == 404


def test_a_port_that_is_taken(capsys):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        config = Config(run_dir="nowhere", serve=ServeConfig(port=taken.getsockname()[1]))
        assert status(main, config, Options("serve")) == 1
    assert "cannot listen" in capsys.readouterr().err
    assert status(main, Config(serve=ServeConfig(host="203.0.113.7")), Options("serve")) == 1
