"""A pane: the HTML of its messages, folded thoughts and calls, and buttons in the reader's language."""

import html
import re
from types import SimpleNamespace

from sft.web import text
from sft.web.panes import _formula_assets, to_page
from sft.web.turns import EXAMPLES, Turn

CALL = {"type": "function", "function": {"name": "get_weather", "arguments": {"city": "<北京>"}}}


def titles(page: str) -> list[str]:
    return re.findall(r'title="([^"]*)"', page)


def test_a_question_is_shown_as_it_was_typed_and_a_reply_as_markdown():
    [page] = to_page([Turn("2*3*4 **a** <b>\n  x", ({"content": "**a** <b> 2*3*4"},))], chinese=False)
    assert '<div class="body" data-testid="user"><span class="text">2*3*4 **a** &lt;b&gt;\n  x</span></div>' in page
    assert '<p><span class="text"><strong>a</strong> &lt;b&gt; 2*3*4</span></p>' in page
    assert re.findall(r'data-text="([^"]*)"', page) == ["2*3*4 **a** &lt;b&gt;\n  x", "**a** &lt;b&gt; 2*3*4"]


def test_thoughts_and_calls_are_folded_and_read_as_they_are():
    reply = {"content": "好", "reasoning_content": "想 <b> 2*3*4\n", "tool_calls": [CALL]}
    [page] = to_page([Turn("?", (reply,))], chinese=False)
    fold = r'<details class="(\w+)"><summary>(.*?)</summary><div class="body">(.*?)</div></details>'
    arguments = html.escape('{\n  "city": "<北京>"\n}')
    assert re.findall(fold, page, re.S) == [
        ("thought", "Thought", '<span class="text">想 &lt;b&gt; 2*3*4</span>'),
        ("call", "Call · get_weather", f"<pre><code>{arguments}</code></pre>"),
    ]
    assert re.findall(r'data-text="([^"]*)"', page) == ["?", "好"]


def test_a_growing_reply_has_no_buttons_and_says_that_it_thinks():
    [page] = to_page([Turn("?", ({"content": "", "reasoning_content": "想"},))], chinese=True, growing=True)
    assert "<summary>正在思考…</summary>" in page and titles(page) == ["复制", "修改问题"]
    [page] = to_page([Turn("?", ({"content": "好", "reasoning_content": "想"},))], chinese=True, growing=True)
    assert "<summary>思考过程</summary>" in page and page.count("data-text") == 1
    [page] = to_page([Turn("?")], growing=True)
    assert 'data-testid="bot"' not in page


def test_buttons_have_the_readers_language():
    turns = [Turn("一", ({"content": "二"},)), Turn("三", ({"content": "四"},))]
    first, last = to_page(turns, chinese=True)
    assert titles(first) == ["复制", "修改问题", "复制", "回答得好", "回答得不好"]
    assert titles(last) == [*titles(first), "重新回答", "撤回问题"]
    assert titles(to_page(turns, chinese=False)[1])[-2:] == ["Ask again", "Take the question back"]
    assert titles(to_page(turns)[0])[0] == "复制 · Copy"


def test_each_pane_shows_its_own_replies():
    turns = [Turn("一", ({"content": "a"}, {"content": "b"})), Turn("二", ({"content": "c"}, {}))]
    assert ["bot" in page for page in to_page(turns, 1)] == [True, False]
    assert ">b<" in to_page(turns, 1)[0] and ">a<" not in to_page(turns, 1)[0]


def test_an_empty_conversation_shows_the_examples():
    [page] = to_page([], chinese=True)
    assert [html.unescape(found) for found in re.findall(r'data-index="\d">(.*?)</button>', page)] == list(EXAMPLES)
    assert "试一试" in page


def test_every_text_is_in_both_languages():
    assert text.ENGLISH.keys() == text.CHINESE.keys()
    for english, chinese in [*text.TEXTS.values(), *text.LABELS.values()]:
        assert english and chinese and set(re.findall(r"{(\w+)", chinese)) <= set(re.findall(r"{(\w+)", english))


def test_katex_is_found_among_gradios_files():
    assert all(name.startswith("assets/") for name in _formula_assets().values())


def test_a_browser_that_names_its_language_is_answered_in_it():
    for language, expected in (("zh-CN,zh;q=0.9,en", "提示"), ("en-US,en", "Note"), ("", "提示 · Note")):
        request = SimpleNamespace(headers={"accept-language": language})
        assert text.label("note", text.is_chinese(request)) == expected
        assert text.refusal(request, "busy").title == expected
