"""Markdown of replies: marks that a person means, every other character as written, and nothing that runs or loads."""

import html
import re
import time

import pytest

from sft.web.markdown import _block_to_html, _markdown, _split_blocks, to_html, to_plain_html

LINK = '<a href="{0}" title="{0}" target="_blank" rel="noopener noreferrer">'


def shown(text: str) -> str:
    """Return the HTML without the elements that only keep spaces."""
    return re.sub(r'<span class="text">(.*?)</span>', r"\1", to_html(text), flags=re.S).strip()


def read(text: str) -> str:
    """Return the characters that a reader sees."""
    return html.unescape(re.sub(r"<[^>]*>", "", to_html(text))).strip("\n")


AS_WRITTEN = [
    "2*3*4=24",
    "__init__",
    "~5~",
    "&lt; &amp; &#42; &nbsp;",
    "a * b * c, a*b*c, (a+b)*c*(d+e), (1)*(2)*(3)",
    "x**2 + y**2 = (a)**2 + 2**3**4",
    "def f(*args, **kwargs): return g(*args, **kwargs)",
    "int *p, *q; *p = *q; (*p)*(*q)",
    "单价*数量*折扣，snake_case_name，_x_，__name__",
    "<b>x</b> <script>alert(1)</script> <!-- a --> <?x a<b std::map<a, b>",
    "![i](http://evil.test/a.png)",
    "[x]() [a[b]](<>) [](  )",
    "[x](javascript:alert(1)) [y](data:text/html,x) [z](//evil.test)",
    r"\*no\* C:\_x\*.txt \d+\.\d+ \[a-z\]+ \\ 5\%",
    "[foo]: http-is-not-here\n[foo]",
    "  24\n+ 18\n= 42",
    "2\n* 3\n= 6",
    "> 5 apples\n>= 3",
    "****",
    "Sum\n===",
    "a    b\n   c  \td",
    "　　春天来了\n　　花开了",
    "#hashtag 1.5 2)x",
    "$$x",
    "$5 and $6 and $$5 and $$6",
    "a ``` <b>",
    "a\u2060b \u200b",
]


@pytest.mark.parametrize("text", AS_WRITTEN)
def test_a_text_without_marks_reads_as_it_was_written(text):
    assert read(text) == text
    assert not re.search(r"<(em|strong|s|hr|a|ul|h1|img|b|script)\b", to_html(text))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("**bold** *really* ~~gone~~", "<p><strong>bold</strong> <em>really</em> <s>gone</s></p>"),
        ("这是**重点**，**注意：**好", "<p>这是<strong>重点</strong>，<strong>注意：</strong>好</p>"),
        ("the answer is **24**.", "<p>the answer is <strong>24</strong>.</p>"),
        ("***both*** _two words_", "<p><em><strong>both</strong></em> <em>two words</em></p>"),
        ("**a *b* c** *a **b** c*", "<p><strong>a <em>b</em> c</strong> <em>a <strong>b</strong> c</em></p>"),
        ("`a*b*c` **is `x*y`**", "<p><code>a*b*c</code> <strong>is <code>x*y</code></strong></p>"),
        ("# Title", "<h1>Title</h1>"),
        ("> said", "<blockquote>\n<p>said</p>\n</blockquote>"),
        ("- a\n- b*c*d", "<ul>\n<li>a</li>\n<li>b*c*d</li>\n</ul>"),
        ("a\n\n---", "<p>a</p>\n<hr>"),
        ("[t](http://ok.test)", f"<p>{LINK.format('http://ok.test')}t</a></p>"),
        ("see http://a.test/b_c_d.", f"<p>see {LINK.format('http://a.test/b_c_d')}http://a.test/b_c_d</a>.</p>"),
    ],
)
def test_marks_that_a_person_means_are_marks(text, expected):
    assert shown(text) == expected


def test_items_keep_the_numbers_of_the_reply():
    assert re.findall(r"<li[^>]*>", to_html("3. a\n5. b\n\n1) c\n1) d")) == [
        '<li value="3">',
        '<li value="5">',
        '<li value="1" class="parenthesis">',
        '<li value="1" class="parenthesis">',
    ]


@pytest.mark.parametrize("formula", ["$$a*b*c_1_d$$", r"\(x_1*y_1*z\)", r"\[ a*b < c \]"])
def test_a_formula_keeps_all_its_characters(formula):
    found = f'<span class="formula">{html.escape(formula)}</span>'
    assert to_html(f"so {formula} ok") == f'<p><span class="text">so {found} ok</span></p>\n'


def test_a_formula_may_take_several_lines():
    text = "$$\n2*3*4\n- a\n= b\n$$"
    assert to_html(f"x\n{text}\ny") == (
        f'<p><span class="text">x</span></p>\n<div class="formula">{text}</div>\n<p><span class="text">y</span></p>\n'
    )


@pytest.mark.parametrize("code", ["<b>2*3*4</b> &lt;", "a = '`'\n\n  b\t__c__\n", "~~~\n> ```", "x\u2060y"])
def test_code_is_what_the_model_wrote(code):
    block = to_html(f"````html\n{code}\n````\n\nafter")
    assert html.unescape(re.search(r"<pre><code>(.*)\n</code></pre>", block, re.S)[1]) == code
    assert '<span class="language">html</span>' in block


def test_inline_code_is_what_the_model_wrote():
    assert to_html("`<b>**x**&lt;`") == '<p><span class="text"><code>&lt;b&gt;**x**&amp;lt;</code></span></p>\n'


def test_a_question_is_shown_as_it_was_typed():
    text = "**2*3*4** <b> &lt;\n\n  `x` # y"
    assert to_plain_html(text) == f'<span class="text">{html.escape(text)}</span>'


TEXTS = [
    "a\n\nb\n\n- c\n\n  d\n\ne\n\n```\n\nf\n\n> ```\n\ng\n```\n\nh",
    "- a\n\n   ```\n\n   b\n\nc\n\n```\n\nd\n\n```\n\ne",
    "~~~ x\n\n```\n\n~~~\n\n1. a\n\n   b\n2. c\n\nd\n\n| a |\n|---|\n| b |\n\ne",
    "``` a`b\n\nc\n\n> d\n\ne\n\n$$\na\n$$\n\nf",
]


@pytest.mark.parametrize("text", TEXTS)
def test_a_reply_that_is_cut_into_blocks_is_the_reply_as_a_whole(text):
    assert re.sub(r"\n+", "\n", to_html(text)) == re.sub(r"\n+", "\n", _markdown().render(text))


def test_a_reply_is_cut_where_an_unindented_line_follows_a_blank_one():
    assert list(_split_blocks(TEXTS[0])) == ["a\n", "b\n\n- c\n\n  d\n", "e\n", "```\n\nf\n\n> ```\n\ng\n```\n", "h"]


def test_a_growing_reply_renders_only_its_last_block_anew():
    _block_to_html.cache_clear()
    text = "\n\n".join(f"paragraph **{number}**" for number in range(50))
    to_html(text)
    misses = _block_to_html.cache_info().misses
    to_html(text + " and more")
    assert _block_to_html.cache_info().misses == misses + 1


@pytest.mark.parametrize("mark", ["*a ", "**a *b ", "[a](", "[[", "$$ a", r"\( a", "*`a ", "~~x ", "_a ", "("])
def test_a_reply_of_marks_alone_takes_no_time(mark):
    begun = time.process_time()
    assert read(mark * (6000 // len(mark))).strip() == (mark * (6000 // len(mark))).strip()
    assert time.process_time() - begun < 5
