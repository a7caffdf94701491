"""The chat page in Chromium: conversations, exact text and copies, both languages, and hostile replies."""

import json
import re
import socket
import time
from contextlib import closing

import pytest

from sft.chat.reply import load_chat
from sft.chat.sampling import Sampling
from sft.web.handlers import Handlers
from sft.web.layout import build_page, serve_page
from sft.web.models import LocalModel
from sft.web.security import Limits

pytestmark = pytest.mark.slow


class Parrot(LocalModel):
    """A model that replies with `script`, a word every `seconds`, and with a thought and calls."""

    script, seconds, thought, calls, thinking = "好", 0.0, "", (), None
    has_thinking_switch = False

    def start(self, messages: list[dict], sampling: Sampling, *, thinking: bool | None = None, tools=None):
        self.thinking = thinking
        return Line(self, messages)


class Line:
    error, queue_position = None, -1

    def __init__(self, parrot: Parrot, messages: list[dict]):
        self.parrot = parrot
        self.words = re.findall(r"\S+\s*|\s+", parrot.script)
        self.seconds = parrot.seconds
        self.begun = time.monotonic()
        self.cancelled = False
        self.messages = messages
        parrot.lines.append(self)

    def cancel(self) -> None:
        self.cancelled = self.cancelled or not self.done

    @property
    def done(self) -> bool:
        return self.cancelled or self.count() == len(self.words)

    def count(self) -> int:
        if not self.seconds:
            return len(self.words)
        return min(len(self.words), int((time.monotonic() - self.begun) / self.seconds))

    def read(self) -> tuple[dict, bool, int]:
        message = {"content": "".join(self.words[: self.count()])}
        if self.parrot.thought:
            message["reasoning_content"] = self.parrot.thought
        if self.parrot.calls and self.done:
            message["tool_calls"] = list(self.parrot.calls)
        return message, self.done, self.count()


@pytest.fixture(scope="module")
def chat(tiny_base):
    return load_chat(str(tiny_base("qwen2")))


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def open_server(models: dict, **options):
    handlers = Handlers(models, limits=Limits(1000), **options)
    page = build_page(handlers)
    serve_page(page, handlers, host="127.0.0.1", port=free_port(), block=False)
    return page


@pytest.fixture(scope="module")
def parrots(chat):
    parrots = Parrot(chat), Parrot(chat)
    for parrot in parrots:
        parrot.lines = []
    return parrots


@pytest.fixture
def parrot(parrots):
    for each in parrots:
        each.script, each.seconds, each.thought, each.calls = "好", 0.0, "", ()
        each.lines.clear()
    return parrots[0]


@pytest.fixture(scope="module")
def likes(tmp_path_factory):
    return tmp_path_factory.mktemp("likes") / "likes.jsonl"


@pytest.fixture(scope="module")
def url(parrots, likes):
    page = open_server({"first": parrots[0], "second": parrots[1]}, feedback=likes)
    yield page.local_url
    page.close(verbose=False)


@pytest.fixture
def tab(browser, url):
    with closing(browser.new_context(locale="en-US", accept_downloads=True)) as context:
        yield open_tab(context, url)


def open_tab(context, url: str):
    page = context.new_page()
    page.set_default_timeout(8_000)
    page.goto(url)
    page.get_by_test_id("textbox").first.wait_for()
    return page


def ask(tab, text: str) -> None:
    tab.get_by_test_id("textbox").first.fill(text)
    tab.keyboard.press("Enter")


def bot(tab, number: int = -1):
    return tab.get_by_test_id("bot").nth(number)


def wait_for_reply(tab, text: str, number: int = -1) -> None:
    tab.wait_for_function(
        """([text, number]) =>
            [...document.querySelectorAll('[data-testid=bot]')].at(number)?.innerText.includes(text)""",
        arg=[text, number],
    )


def wait_until_ready(tab) -> None:
    tab.wait_for_function("() => !document.querySelector('[data-testid=textbox]').disabled")


def wait_until(holds) -> None:
    end = time.monotonic() + 60
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.05)


def test_the_page_is_in_the_browsers_language(browser, url):
    for locale, title, box in (
        ("zh-CN", "和你的模型对话", "输入消息"),
        ("en-US", "Chat with your model", "Type a message"),
    ):
        with closing(browser.new_context(locale=locale)) as context:
            tab = open_tab(context, url)
            tab.get_by_text(title).wait_for()
            assert tab.get_by_test_id("textbox").first.get_attribute("placeholder") == box


def test_a_reply_streams_and_its_tokens_are_counted(tab, parrot):
    parrot.script, parrot.seconds = " ".join(f"w{index}" for index in range(20)), 0.1
    ask(tab, "hello")
    wait_for_reply(tab, "w2")
    assert "w19" not in bot(tab).inner_text()
    wait_for_reply(tab, "w19")
    tab.get_by_text(re.compile(r"20 tokens · [\d.]+ tokens/s")).first.wait_for()


def test_stop_ends_the_reply_and_keeps_what_was_said(tab, parrot):
    parrot.script, parrot.seconds = "word " * 500, 0.1
    ask(tab, "hello")
    wait_for_reply(tab, "word word")
    tab.locator("button.stop-button").click()
    wait_until(lambda: parrot.lines[-1].cancelled)
    wait_until_ready(tab)
    assert "word word" in bot(tab).inner_text()


def test_a_closed_tab_ends_the_reply(browser, url, parrot):
    parrot.script, parrot.seconds = "word " * 500, 0.1
    with closing(browser.new_context(locale="en-US")) as context:
        ask(tab := open_tab(context, url), "hello")
        wait_for_reply(tab, "word")
    wait_until(lambda: parrot.lines[-1].cancelled)


def test_retry_edit_and_undo(tab, parrot):
    parrot.script = "one"
    ask(tab, "first question")
    wait_for_reply(tab, "one")
    wait_until_ready(tab)
    parrot.script = "two"
    tab.get_by_label("Ask again").last.click()
    wait_for_reply(tab, "two")
    wait_until_ready(tab)
    assert [message["content"] for message in parrot.lines[-1].messages] == ["first question"]
    tab.get_by_label("Edit the question").last.click()
    parrot.script = "three"
    assert tab.locator("textarea.editor").input_value() == "first question"
    tab.locator("textarea.editor").fill("second question")
    tab.get_by_role("button", name="Send").last.click()
    wait_for_reply(tab, "three")
    wait_until_ready(tab)
    assert [message["content"] for message in parrot.lines[-1].messages] == ["second question"]
    tab.get_by_label("Take the question back").last.click()
    tab.wait_for_function("() => !document.querySelector('[data-testid=bot]')")
    assert tab.get_by_test_id("textbox").first.input_value() == "second question"


EVIL = """<script>window.hurt = 1</script>
<img src=x onerror="window.hurt = 1"> ![image](http://evil.test/a.png)
<iframe src="http://evil.test"></iframe><svg onload="window.hurt = 1"></svg>
<form action="http://evil.test"><button>Go</button></form>
<div style="position:fixed;inset:0;background:red;z-index:9999">over the page</div>
[click](javascript:window.hurt=1) [data](data:text/html,<script>window.hurt=1</script>)
$$\\href{javascript:window.hurt=1}{x} \\includegraphics{http://evil.test/b.png}$$
<style>body { display: none }</style><a href="x" style="position:fixed;inset:0">cover</a>
```mermaid
graph TD; A["<img src=http://evil.test/c.png onerror=window.hurt=1>"] --> B; click A "javascript:window.hurt=1"
```
the end"""


def test_a_reply_never_runs_loads_posts_or_covers(tab, url, parrot):
    asked_for, dialogs = [], []
    tab.on("request", lambda request: asked_for.append(request.url))
    tab.on("dialog", lambda dialog: dialogs.append(dialog) or dialog.dismiss())
    parrot.script = EVIL
    ask(tab, EVIL)
    wait_for_reply(tab, "the end")
    wait_until_ready(tab)
    for link in tab.locator(".conversation a").all():
        assert not (link.get_attribute("href") or "").startswith(("javascript:", "data:"))
    tab.wait_for_timeout(500)
    assert tab.evaluate("window.hurt") is None and dialogs == []
    assert [address for address in asked_for if "evil" in address] == []
    hurtful = "form, iframe, script, img, style"
    assert [each.evaluate("each => each.outerHTML") for each in tab.locator(".body").locator(hurtful).all()] == []
    # The corner of the page is still the page's own.
    assert tab.evaluate("document.elementFromPoint(5, 5).closest('.message')") is None
    assert tab.evaluate("getComputedStyle(document.body).display") != "none"


AS_WRITTEN = [
    "2*3*4=24 and (a+b)*c*(d+e)",
    "__init__ calls __name__, ~5~ of 7",
    "&lt;b&gt; &amp; &#42; a < b",
    "单价*数量*折扣=2*3*4",
    r"C:\_x\*.txt and \d+\.\d+",
]


@pytest.mark.parametrize("text", AS_WRITTEN)
def test_question_and_reply_read_as_they_were_written(tab, parrot, text):
    parrot.script = text
    ask(tab, text)
    wait_for_reply(tab, text)
    wait_until_ready(tab)
    assert bot(tab).inner_text() == text
    assert tab.get_by_test_id("user").last.inner_text() == text
    assert tab.locator(".body :is(em, strong, s, a)").count() == 0


def test_a_question_is_never_markdown(tab, parrot):
    question = "**bold** *it* `code`\n# title\n- item <b>x</b> $$x^2$$ [a](http://b.test)"
    tab.get_by_test_id("textbox").first.fill(question)
    tab.keyboard.press("Enter")
    wait_for_reply(tab, "好")
    assert tab.get_by_test_id("user").last.inner_text() == question
    assert tab.locator(".user .body *:not(span)").count() == 0
    assert parrot.lines[-1].messages[-1]["content"] == question


def clipboard(tab) -> str:
    return tab.evaluate("navigator.clipboard.readText()")


def test_copies_are_what_the_model_wrote(browser, url, parrot):
    code = "x = '<b>' * 2*3*4  # __init__ &lt;\n\n\tprint(\"$$a$$\")"
    parrot.script = f"**Use** `a<b*c*d &amp; __e__`:\n\n```python\n{code}\n```\nthe end"
    with closing(browser.new_context(locale="en-US", permissions=["clipboard-read", "clipboard-write"])) as context:
        ask(tab := open_tab(context, url), "2*3*4 <b>&lt;")
        wait_for_reply(tab, "the end")
        wait_until_ready(tab)
        tab.get_by_label("Copy the code").click()
        wait_until(lambda: clipboard(tab) == code + "\n")
        tab.locator(".bot [data-action=copy]").click()
        wait_until(lambda: clipboard(tab) == parrot.script)
        tab.locator(".user [data-action=copy]").click()
        wait_until(lambda: clipboard(tab) == "2*3*4 <b>&lt;")
        # Selected by hand.
        tab.evaluate("getSelection().selectAllChildren(document.querySelector('p code'))")
        tab.keyboard.press("Control+c")
        wait_until(lambda: clipboard(tab) == "a<b*c*d &amp; __e__")


def test_a_formula_keeps_its_stars_and_a_thought_is_folded(tab, parrot):
    parrot.thought = "so so 2*3*4"
    parrot.script = "It is $$a*b*c$$ and \\(x_1*y_1\\) and\n\n$$\n2*3*4\n$$\n\n```python\nprint(1)\n```\n"
    ask(tab, "hello")
    tab.locator(".katex").first.wait_for()
    wait_until_ready(tab)
    sources = tab.locator(".katex annotation").all_text_contents()
    assert [source.strip() for source in sources] == ["a*b*c", "x_1*y_1", "2*3*4"]
    assert not tab.get_by_text("so so").is_visible()
    tab.get_by_text("Thought").click()
    assert tab.locator("details .body").inner_text() == "so so 2*3*4"
    assert tab.locator("pre code").inner_text() == "print(1)\n"


def test_an_open_thought_stays_open_while_the_reply_grows(tab, parrot):
    parrot.thought, parrot.script, parrot.seconds = "so so", "word " * 60, 0.1
    ask(tab, "hello")
    wait_for_reply(tab, "word")
    tab.get_by_text("Thought").click()
    wait_for_reply(tab, "word " * 15)
    assert tab.get_by_text("so so").is_visible()
    tab.locator("button.stop-button").click()
    wait_until_ready(tab)
    assert tab.get_by_text("so so").is_visible()


def test_a_call_is_folded_and_exported(tab, parrot):
    call = {"type": "function", "function": {"name": "get_weather", "arguments": {"city": "北京"}}}
    parrot.calls, parrot.thought, parrot.script = (call,), "想", " "
    ask(tab, "天气")
    tab.get_by_text("Call · get_weather").wait_for()
    wait_until_ready(tab)
    assert not tab.get_by_text('"city"').is_visible()
    tab.get_by_text("Call · get_weather").click()
    assert json.loads(tab.locator("details.call .body").inner_text()) == {"city": "北京"}
    tab.get_by_text("Settings").click()
    tab.get_by_role("button", name="Export the conversation").click()
    with tab.expect_download() as download:
        tab.get_by_role("link", name="json").click()
    reply = json.loads(download.value.path().read_text(encoding="utf-8"))["messages"][1]
    assert (reply["reasoning_content"], reply["tool_calls"]) == ("想", [call])


def test_the_page_names_its_model_and_has_the_switch_of_a_model_that_thinks(browser, parrots, parrot):
    parrot.has_thinking_switch = True
    page = open_server({"my <run>": parrot})
    try:
        with closing(browser.new_context(locale="zh-CN")) as context:
            tab = open_tab(context, page.local_url)
            assert tab.locator(".model-name").inner_text() == "my <run>"
            tab.get_by_text("设置").click()
            tab.get_by_label("先思考再回答").uncheck()
            ask(tab, "一")
            wait_for_reply(tab, "好")
            wait_until_ready(tab)
            assert parrot.thinking is False
            titles = [button.get_attribute("title") for button in tab.locator(".message button").all()]
            assert titles[:2] == ["复制", "修改问题"] and titles[-2:] == ["重新回答", "撤回问题"]
    finally:
        parrot.has_thinking_switch = False
        page.close(verbose=False)


def test_two_people_have_two_conversations(browser, url, parrots, parrot):
    with closing(browser.new_context(locale="en-US")) as one, closing(browser.new_context(locale="zh-CN")) as two:
        tabs = open_tab(one, url), open_tab(two, url)
        parrot.script, parrot.seconds = "slow " * 20, 0.1
        ask(tabs[0], "first person")
        wait_for_reply(tabs[0], "slow")
        parrot.script, parrot.seconds = "quick", 0.0
        ask(tabs[1], "second person")
        wait_for_reply(tabs[1], "quick")
        assert "slow slow" not in tabs[1].content()
        wait_for_reply(tabs[0], "slow " * 19)
        assert "quick" not in bot(tabs[0]).inner_text()
    assert [line.messages[-1]["content"] for line in parrot.lines] == ["first person", "second person"]


def test_a_conversation_is_downloaded(tab, parrot):
    ask(tab, "你好")
    wait_for_reply(tab, "好")
    wait_until_ready(tab)
    tab.get_by_text("Settings").click()
    tab.get_by_role("button", name="Export the conversation").click()
    with tab.expect_download() as download:
        tab.get_by_role("link", name="json").click()
    record = json.loads(download.value.path().read_text(encoding="utf-8"))
    assert download.value.suggested_filename == "conversation.json"
    assert [message["content"] for message in record["messages"]] == ["你好", "好"]


def test_a_like_is_written_down(tab, parrot, likes):
    ask(tab, "你好")
    wait_for_reply(tab, "好")
    wait_until_ready(tab)
    tab.get_by_label("Good reply").last.click()
    tab.get_by_text("noted, thank you").first.wait_for()
    assert json.loads(likes.read_text().splitlines()[-1])["messages"][-1]["content"] == "好"


def test_two_models_answer_side_by_side(browser, parrots, parrot):
    parrots[0].script, parrots[1].script = "from the first", "from the second"
    page = open_server({"first": parrots[0], "second": parrots[1]}, num_panes=2)
    try:
        with closing(browser.new_context(locale="en-US")) as context:
            tab = open_tab(context, page.local_url)
            box = tab.locator("textarea").last
            tab.get_by_placeholder("Type a message").fill("hello")
            tab.keyboard.press("Enter")
            wait_for_reply(tab, "from the first", 0)
            wait_for_reply(tab, "from the second", 1)
            assert box is not None
    finally:
        page.close(verbose=False)
    assert [line.messages for each in parrots for line in each.lines] == [[{"role": "user", "content": "hello"}]] * 2
