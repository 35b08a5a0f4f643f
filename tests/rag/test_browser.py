"""The page in a real browser: typed into, read, and with documents that try to run code there."""

from __future__ import annotations

import shutil
import socket
import threading
import time

import pytest

from rag.config import ServeConfig
from rag.data.corpus import Passage, Passages
from rag.reader.pipeline import Pipeline
from rag.reader.reader import Answer
from rag.serve import build_app
from tests.rag.test_serve import Fixed

webdriver = pytest.importorskip("selenium.webdriver", reason="pip install selenium")
from selenium.webdriver.common.by import By  # noqa: E402 (needs selenium)
from selenium.webdriver.common.keys import Keys  # noqa: E402
from selenium.webdriver.support.wait import WebDriverWait as Wait  # noqa: E402

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
DRIVER = shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(
    BROWSER is None or DRIVER is None, reason="needs Chromium and its driver (apt install chromium chromium-driver)"
)


@pytest.fixture(scope="module")
def elsewhere():
    """An address that counts who connects: nobody may."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        listener.settimeout(0.2)
        yield listener


@pytest.fixture(scope="module")
def address(elsewhere):
    """A served page whose first document is hostile."""
    import uvicorn

    outside = f"http://127.0.0.1:{elsewhere.getsockname()[1]}"
    evil = (
        "<script>document.title='owned'</script>"
        f"<img src={outside}/a onerror=\"document.title='owned'\"><style>@import url({outside}/b)</style>"
        "It was Ada Lovelace, wrote Ada Lovelace."
    )
    passages = (Passage("a<b>.txt#1", evil, f"<iframe src={outside}/c></iframe>"), Passage("c.txt#1", "Nothing here."))
    side = Fixed()
    side.answer_ = Answer("ada lovelace", passages, (0,), 0.7)
    side.passages = Passages(passages)
    side.stream = lambda question, shown: iter(("ada lovelace", side.answer_))
    app = build_app(Pipeline(side, side, 2, 0.0, "a reader"), ServeConfig(longest_question=50), "my notes")
    server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=0, log_level="warning"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    deadline = time.monotonic() + 20
    while not server.started:
        assert time.monotonic() < deadline, "the server does not start"
        time.sleep(0.02)
    yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    server.should_exit = True
    thread.join(10)


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    options = webdriver.ChromeOptions()
    options.binary_location = BROWSER
    profile = tmp_path_factory.mktemp("profile")
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", f"--user-data-dir={profile}"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(executable_path=DRIVER))
    driver.set_page_load_timeout(30)
    yield driver
    driver.quit()


def focused(browser):
    """Autofocus acts when the page is first drawn, which may be after it has been loaded."""
    return browser.switch_to.active_element.get_attribute("aria-label") == "Question"


def answered(browser):
    """The answer is there, and all that follows it on the page."""
    shown = browser.find_elements(By.CLASS_NAME, "answer")
    return bool(shown) and browser.execute_script("return document.readyState") == "complete"


def ask(browser, address, question):
    """Type a question and press Enter, as a person does."""
    browser.get(address)
    Wait(browser, 20).until(focused)  # nobody has to click first
    browser.switch_to.active_element.send_keys(question, Keys.ENTER)
    Wait(browser, 20).until(answered)
    return browser.find_element(By.TAG_NAME, "body").text


def test_a_question_is_typed_and_answered(browser, address):
    text = ask(browser, address, "Who wrote <it>?")
    assert browser.find_element(By.CLASS_NAME, "answer").text == "ada lovelace"
    assert browser.find_element(By.NAME, "q").get_attribute("value") == "Who wrote <it>?"
    assert "Confidence 0.70" in text and "my notes" in text and "ms" in text
    sources = browser.find_elements(By.TAG_NAME, "li")
    assert ["cited" in source.text for source in sources] == [True, False]
    marks = sources[0].find_elements(By.TAG_NAME, "mark")
    assert [mark.text for mark in marks] == ["Ada Lovelace", "Ada Lovelace"]
    body, marked = (element.value_of_css_property("background-color") for element in (sources[1], marks[0]))
    assert body != marked  # the style was let in: one sees where the answer stands


def test_a_document_is_text_and_nothing_else(browser, address, elsewhere):
    text = ask(browser, address, "Who?")
    assert "<script>document.title='owned'</script>" in text and "<iframe" in text  # shown, not obeyed
    assert browser.title == "my notes"
    assert not browser.find_elements(By.CSS_SELECTOR, "script, img, iframe, li style")
    with pytest.raises(TimeoutError):
        elsewhere.accept()


def test_a_script_that_gets_in_is_not_run(browser, address, elsewhere):
    """The policy holds even where something was forgotten to be escaped."""
    browser.get(address)
    browser.execute_script(
        "const script = document.createElement('script'); script.textContent = \"document.title = 'owned'\";"
        "const image = new Image(); image.src = arguments[0]; document.body.append(script, image);",
        f"http://127.0.0.1:{elsewhere.getsockname()[1]}/image",
    )
    assert browser.title == "my notes"
    with pytest.raises(TimeoutError):
        elsewhere.accept()
    assert any("Content Security Policy" in entry["message"] for entry in browser.get_log("browser"))


def test_a_question_that_is_too_long(browser, address):
    assert "at most 50" in ask(browser, address, "x" * 51)
    assert browser.find_element(By.NAME, "q").get_attribute("value") == "x" * 51  # to be shortened, not typed anew


def test_a_narrow_window(browser, address):
    """A telephone's width: nothing sticks out."""
    before = browser.get_window_size()
    browser.set_window_size(420, 800)
    ask(browser, address, "Who?")
    wide, shown = browser.execute_script("return [document.documentElement.scrollWidth, window.innerWidth]")
    browser.set_window_size(before["width"], before["height"])
    assert wide <= shown
