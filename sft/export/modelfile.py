"""Writes an Ollama Modelfile whose Go template renders what the model was trained on.

Ollama runs the template once over all messages: `.Messages` has them, `.System` the system messages' text, joined.
A SYSTEM line in the Modelfile is put in front when a request has none. The reply's header stands at the end, left open.
"""

import json

from sft.chat.sampling import BLOSSOM
from sft.format.render import Renderer
from sft.format.table import CHAT_FORMATS, ChatFormat, bind_format

# What str.strip takes away, by bytes in UTF-8: Go's templates have no trim, but they slice strings by bytes.
SPACES = {1: "\t\n\v\f\r\x1c\x1d\x1e\x1f ", 2: "\x85\xa0", 3: "\u1680\u2028\u2029\u202f\u205f\u3000"}
SPACES[3] += "".join(map(chr, range(0x2000, 0x200B)))


def modelfile(renderer: Renderer, source: str) -> str:
    """Return the Modelfile for the weights in `source`: template, stop words, Blossom's sampling, system line.

    There is no num_predict: it would cap every reply. Raises ValueError for the format `base`, whose template is a
    program in Jinja, and for what a Modelfile can't quote.
    """
    if renderer.name not in CHAT_FORMATS:
        raise ValueError(
            f"chat format {renderer.name!r}: the base's own template is a program in Jinja, which nothing translates "
            "to Go faithfully; train with a format of the table (--chat_format chatml, ...), or use llama-server"
        )
    row = bind_format(CHAT_FORMATS[renderer.name], renderer.tokenizer)
    lines = [f"FROM {source}", f"TEMPLATE {quoted(go_template(row))}"]
    lines += [f"SYSTEM {quoted(row.default_system)}"] if row.default_system else []
    lines += [f"PARAMETER {name} {getattr(BLOSSOM, name)}" for name in ("temperature", "top_p", "top_k")]
    lines += [f"PARAMETER repeat_penalty {BLOSSOM.repetition_penalty}", "PARAMETER repeat_last_n -1"]
    stops = renderer.tokenizer.convert_ids_to_tokens(renderer.stop_ids)
    return "\n".join([*lines, *(f"PARAMETER stop {quoted(stop)}" for stop in stops)]) + "\n"


def go_template(row: ChatFormat) -> str:
    """Write a bound chat format as a Go template, all text in quoted strings, so that nothing is trimmed by accident.

    bos is left out: llama.cpp's tokenizer writes it, as the GGUF says.
    """
    default = ["else", *_say(row.system[0], row.default_system, row.system[1])] if row.default_system else []
    system = ["if $.System", *_say(row.system[0]), 'template "strip" $.System', *_say(row.system[1]), *default, "end"]
    once = ["if $first", *system, "end", "$first = false"]
    actions = [
        *_define_strip(),
        *("$open := true", "$first := true"),
        *([] if row.system_in_user else system),
        "range .Messages",
        *('if eq .Role "user"', *_say(row.user[0]), *(once if row.system_in_user else [])),
        *('template "strip" .Content', *_say(row.user[1]), "$open = true"),
        *('else if eq .Role "assistant"', *_say(row.header, row.gap)),
        *('template "strip" .Content', *_say(row.end, row.between), "$open = false"),
        *("end", "end"),
        *("if $open", *_say(row.header), "end"),
    ]
    return "".join(f"{{{{- {action} -}}}}\n" for action in actions)


def _say(*texts: str) -> list[str]:
    return [json.dumps(text, ensure_ascii=False) for text in texts if text]


def _define_strip() -> list[str]:
    """Define templates that print a text without whitespace at its edges, a character at a time.

    There is no arithmetic: all but the last n bytes end where a text without its first n would end.
    """
    left = ("left", "slice . 0 {n}", "slice . $n", ".")
    right = ("strip", "slice . (len (slice . {n}))", "slice . 0 (len (slice . $n))", 'template "left" .')
    actions = []
    for name, edge, rest, done in (left, right):
        actions += [f'define "{name}"', "$n := 0"]
        for n, spaces in SPACES.items():
            alternatives = " ".join(f'"\\u{ord(space):04x}"' for space in spaces)
            actions += [f"if ge (len .) {n}", f"if eq ({edge.format(n=n)}) {alternatives}", f"$n = {n}", "end", "end"]
        actions += ["if $n", f'template "{name}" ({rest})', "else", done, "end", "end"]
    return actions


def quoted(text: str) -> str:
    """Quote for a Modelfile, which knows no escapes and drops what isn't printable but for newlines and spaces."""
    if '"""' in text or not text.replace("\n", "").isprintable():
        raise ValueError(f"a Modelfile can't hold {text[:40]!r}")
    return f'"""{text}"""'
