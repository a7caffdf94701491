"""Markdown of a reply as safe HTML that reads as the model wrote it.

CommonMark's blocks, code, links and tables are kept. HTML, images, entities and backslash escapes stay text. A star,
an underscore or a tilde is a mark only where a person would mean it: never inside a word, a number or a formula. All
text is escaped, and links lead to http, https and mail alone, so no sanitiser is needed after this.

    2*3*4=24   __init__   ~5~   &lt;   <b>        as they are
    **bold**   *really*   ~~gone~~   `code`       marked
    $$a*b$$   \\[a*b\\]   \\(a*b\\)               formulas, which the page gives to KaTeX
"""

import functools
import re
from collections.abc import Callable, Iterator
from html import escape

from markdown_it import MarkdownIt
from markdown_it.rules_block import StateBlock
from markdown_it.rules_core import StateCore
from markdown_it.rules_inline import StateInline
from markdown_it.token import Token

RULES = ["fence", "blockquote", "hr", "list", "heading", "table", "backticks", "link"]
# Text before an opening mark and after a closing one: in `(a)*b*(c)` or `2**3**4` the marks are operators.
BEFORE = re.compile(r"(^|[\s(\[{“‘（《「『【—–\-:：，。；、！？…*_~|>])$")
AFTER = re.compile(r"^($|[\s)\]}”’）》」』】—–\-.,;:!?，。；：！？、…*_~|])")
BEFORE_BOLD = re.compile(r"(^|[^A-Za-z0-9_)\]\\])$")
AFTER_BOLD = re.compile(r"^($|[^A-Za-z0-9_(\[])")
IDENTIFIER = re.compile(r"[A-Za-z0-9_]+")
LETTER = re.compile(r"[^\W\d_]")
URL = re.compile(r"https?://[^\s<>\"'`，。；：！？、）》」』】“”‘’]+")
URL_END = re.compile(r"[.,;:!?*_~]+$")
LINK = re.compile(r"(https?://|mailto:)", re.IGNORECASE)
NO_ADDRESS = re.compile(r"\]\(\s*(<>)?\s*(\"[^\"]*\"|'[^']*')?\s*\)$")
IMAGE = re.compile(r"!\[[^\]\n]*\]\([^)\n]*\)")
# Lines that would begin a block in CommonMark, and are text here; inside a paragraph more of them are.
TEXT_LINES = {
    "list": r"\+",
    "blockquote": r">[ \t]*[\d=]",
    "hr": r"(?!(-{3,}|\*\*\*|\* \* \*)[ \t]*$)",
}
CALCULATION = r"\+[ \t]|[*-][ \t]+[\d(]"  # `+ 18` under a sum, or `* 3` in the midst of a calculation, is no bullet
TEXT = re.compile(r"(?:[^*_~`\[\]!$\\h]|h(?!ttps?://))+")
MARK = re.compile(r"\*+|_+|~+")
NEW_BLOCK = re.compile(r"[^\s>*+\-\d|]")
FENCE = re.compile(r"( {0,3})(`{3,}(?=[^`]*$)|~{3,})(.*)")
MARKS = re.compile(r"[*_~`\[\]$]|\\\(")
MAX_BLOCK = 50_000  # characters
MAX_MARKS = 2_000  # of a block: reading it takes time in the square of them
TAGS = {
    **{"*": ["em"], "**": ["strong"], "***": ["em", "strong"], "~~": ["s"]},
    **{"_": ["em"], "__": ["strong"], "___": ["em", "strong"]},
}
FORMULAS = {"$$": "$$", r"\[": r"\]", r"\(": r"\)"}


def to_html(text: str) -> str:
    """Return safe HTML of a Markdown text; one with too many marks to be read quickly is shown as it is."""
    return "".join(_block_to_html(block) for block in _split_blocks(text))


@functools.lru_cache(maxsize=2048)
def _block_to_html(text: str) -> str:
    # A reply is rendered anew with each of its tokens, but only its last block has changed since.
    if len(text) > MAX_BLOCK or len(MARKS.findall(text)) > MAX_MARKS:
        return f"<p>{to_plain_html(text.strip(chr(10)))}</p>"
    return _markdown().render(text)


def _split_blocks(text: str) -> Iterator[str]:
    """Cut a text before each unindented line that follows a blank one, which ends all blocks but fenced code.

    After a fence that is indented by one to three spaces, which may belong to a list, nothing is cut.
    """
    block = []
    fence = ""
    blank = False
    may_cut = True
    for line in text.replace("\r\n", "\n").replace("\r", "\n").split("\n"):
        if may_cut and blank and not fence and NEW_BLOCK.match(line):
            yield "\n".join(block)
            block = []
        block.append(line)
        blank = not line.strip()
        if not (found := FENCE.match(line)):
            continue
        if not fence:
            fence = found[2]
            may_cut = may_cut and not found[1]
        elif found[2].startswith(fence) and not found[3].strip():
            fence = ""
    yield "\n".join(block)


def to_plain_html(text: str) -> str:
    """Return safe HTML of a text that is shown as it was typed."""
    return f'<span class="text">{escape(text)}</span>'


@functools.cache
def _markdown() -> MarkdownIt:
    markdown = MarkdownIt("zero", {"html": False, "linkify": False, "typographer": False}).enable(RULES)
    markdown.validateLink = lambda url: bool(LINK.match(url))
    block = markdown.block.ruler
    inline = markdown.inline.ruler
    for name, text_line in TEXT_LINES.items():
        rule = next(rule for rule in block.__rules__ if rule.name == name)
        block.at(name, _unless_text(re.compile(text_line), rule.fn), {"alt": rule.alt})
    block.before("fence", "formula", _formula_block, {"alt": ["paragraph", "blockquote", "list"]})
    inline.at("text", _as_text(TEXT))
    inline.at("link", _only_with_address(next(rule.fn for rule in inline.__rules__ if rule.name == "link")))
    for name, rule in (("formula", _formula), ("image_text", _as_text(IMAGE)), ("mark", _mark), ("url", _url)):
        inline.push(name, rule)
    markdown.core.ruler.before("inline", "as_written", _keep_spaces)
    markdown.core.ruler.push("wrap", _wrap_texts)
    for name, rule in RENDER_RULES.items():
        markdown.add_render_rule(name, rule)
    return markdown


# --- blocks -------------------------------------------------------------------------------------------------------


def _unless_text(text_line: re.Pattern, rule: Callable) -> Callable:
    """Return a block rule that leaves some lines as text."""

    def tried(state: StateBlock, start: int, end: int, silent: bool) -> bool:  # silent: inside a paragraph
        line = state.src[state.bMarks[start] + state.tShift[start] : state.eMarks[start]]
        return not (text_line.match(line) or (silent and re.match(CALCULATION, line))) and rule(
            state, start, end, silent
        )

    return tried


def _formula_block(state: StateBlock, start: int, end: int, silent: bool) -> bool:
    """Read `$$ … $$` or `\\[ … \\]` that begins a line, over several lines."""
    first = state.src[state.bMarks[start] + state.tShift[start] : state.eMarks[start]]
    close = FORMULAS.get(first[:2]) if not first.startswith(r"\(") else None
    if not close:
        return False
    source = state.getLines(start, end, state.blkIndent, False)
    length = source.find(close, source.index(first[:2]) + 2)
    if length < 0 or (rest := source[length + 2 :].split("\n")[0]).strip() or "\n\n" in source[:length]:
        return False
    if silent:
        return True
    whole = source[: length + 2 + len(rest)]
    token = state.push("formula_block", "", 0)
    token.content = whole.strip()
    state.line = start + whole.count("\n") + 1
    token.map = [start, state.line]
    return True


def _keep_spaces(state: StateCore) -> None:
    """Give the paragraphs their own lines back: CommonMark removes the spaces that lines begin with."""
    lines = state.src.split("\n")
    for opening, token in zip(state.tokens, state.tokens[1:], strict=False):
        if opening.type == "paragraph_open" and opening.level == 0 and opening.map:
            token.content = "\n".join(lines[opening.map[0] : opening.map[1]]).rstrip()


def _wrap_texts(state: StateCore) -> None:
    """Put each text into an element of its own, in which CSS keeps spaces and line breaks."""
    for token in state.tokens:
        if token.type == "inline":
            opening = Token("text_open", "span", 1, attrs={"class": "text"})
            token.children = [opening, *(token.children or []), Token("text_close", "span", -1)]


# --- text ---------------------------------------------------------------------------------------------------------


def _as_text(pattern: re.Pattern) -> Callable:
    """Return an inline rule that takes what a pattern matches as text."""

    def take(state: StateInline, silent: bool) -> bool:
        found = pattern.match(state.src, state.pos, state.posMax)
        if found:
            state.pos = found.end()
            state.pending += found[0] if not silent else ""
        return bool(found)

    return take


def _mark(state: StateInline, silent: bool) -> bool:
    """Read emphasis (`*`, `**`, `***`, `_`, …) and `~~strikethrough~~`; a run that is no mark is text as a whole."""
    found = MARK.match(state.src, state.pos, state.posMax)
    if not found:
        return False
    mark = found[0]
    close = _find_closing(state, found.start(), mark) if mark in TAGS else None
    if close is None:
        state.pending += mark if not silent else ""
        state.pos = found.end()
        return True
    if not silent:
        _push_marked(state, found.end(), close, TAGS[mark])
    state.pos = close + len(mark)
    return True


def _find_closing(state: StateInline, start: int, mark: str) -> int | None:
    """Return where the mark that begins at `start` is closed, code and links left out."""
    source = state.src
    inner = start + len(mark)
    is_bold = mark in ("**", "***", "~~")
    before = BEFORE_BOLD if is_bold else BEFORE
    unclosed = (state.posMax, mark)
    if inner >= state.posMax or source[inner].isspace() or not before.search(source[max(0, start - 1) : start]):
        return None
    if unclosed in state.cache:  # an earlier scan has reached the end
        return None
    found = _scan_to_closing(state, inner, mark, AFTER_BOLD if is_bold else AFTER)
    if found is None:
        state.cache[unclosed] = inner
    elif _is_emphasis(source[inner:found], mark):
        return found
    return None


def _scan_to_closing(state: StateInline, inner: int, mark: str, after: re.Pattern) -> int | None:
    source = state.src
    old = state.pos
    state.pos = inner
    found = None
    while state.pos < state.posMax and found is None:
        run = MARK.match(source, state.pos, state.posMax)
        if not run:
            state.md.inline.skipToken(state)
            continue
        state.pos = run.end()
        if run[0] == mark and not source[run.start() - 1].isspace() and after.match(source[run.end() : run.end() + 1]):
            found = run.start()
    state.pos = old
    return found


def _is_emphasis(content: str, mark: str) -> bool:
    """`__init__` is a name and `*3*` an operand; `**24**` and `*really*` are emphasised."""
    if mark[0] == "_":
        return not IDENTIFIER.fullmatch(content)
    return bool(content) and (len(mark) > 1 or bool(LETTER.search(content)))


def _push_marked(state: StateInline, start: int, end: int, tags: list[str]) -> None:
    for tag in tags:
        state.push(f"{tag}_open", tag, 1)
    old = state.posMax
    state.pos = start
    state.posMax = end
    state.md.inline.tokenize(state)
    state.posMax = old
    for tag in reversed(tags):
        state.push(f"{tag}_close", tag, -1)


def _formula(state: StateInline, silent: bool) -> bool:
    opening = state.src[state.pos : state.pos + 2]
    if opening not in FORMULAS:
        return False
    end = state.src.find(FORMULAS[opening], state.pos + 2, state.posMax)
    content = state.src[state.pos + 2 : end]
    if end < 0 or not content.strip() or (opening == "$$" and content != content.strip()):
        return False
    if opening == r"\[" and not (content[0].isspace() and content[-1].isspace()):  # `\[a-z\]` is a pattern
        return False
    if not silent:
        state.push("formula", "", 0).content = opening + content + FORMULAS[opening]
    state.pos = end + 2
    return True


def _only_with_address(rule: Callable) -> Callable:
    """Return the link rule without `[x]()`, which would lose its brackets."""

    def tried(state: StateInline, silent: bool) -> bool:
        start = state.pos
        num_tokens = len(state.tokens)
        pending = state.pending
        if not rule(state, silent):
            return False
        if not NO_ADDRESS.search(state.src[start : state.pos]):
            return True
        state.pos = start
        state.pending = pending
        del state.tokens[num_tokens:]
        return False

    return tried


def _url(state: StateInline, silent: bool) -> bool:
    found = URL.match(state.src, state.pos, state.posMax)
    if not found or state.linkLevel:
        return False
    url = URL_END.sub("", found[0])
    if url.endswith(")") and "(" not in url:
        url = url[:-1]
    if not silent:
        state.push("link_open", "a", 1).attrs = {"href": url}
        state.push("text", "", 0).content = url
        state.push("link_close", "a", -1)
    state.pos += len(url)
    return True


# --- HTML ---------------------------------------------------------------------------------------------------------


def _render_fence(_renderer, tokens: list[Token], index: int, _options, _env) -> str:
    token = tokens[index]
    language = escape(token.info.strip().split(" ")[0][:40])
    body = f"<pre><code>{escape(token.content)}</code></pre>"
    return f'<div class="code"><span class="language">{language}</span>{body}</div>\n'


def _render_formula(_renderer, tokens: list[Token], index: int, _options, _env) -> str:
    tag, end = ("div", "\n") if tokens[index].type == "formula_block" else ("span", "")
    return f'<{tag} class="formula">{escape(tokens[index].content)}</{tag}>{end}'


def _render_link_open(_renderer, tokens: list[Token], index: int, _options, _env) -> str:
    href = escape(str(tokens[index].attrs.get("href", "")))
    return f'<a href="{href}" title="{href}" target="_blank" rel="noopener noreferrer">'


def _render_list_item_open(_renderer, tokens: list[Token], index: int, _options, _env) -> str:
    """Number each item as the reply does, also in `3. 5.` or `1. 1.`."""
    token = tokens[index]
    if not token.info:
        return "<li>"
    style = ' class="parenthesis"' if token.markup == ")" else ""
    return f'<li value="{int(token.info)}"{style}>'


RENDER_RULES = {
    "fence": _render_fence,
    "formula": _render_formula,
    "formula_block": _render_formula,
    "link_open": _render_link_open,
    "list_item_open": _render_list_item_open,
}
