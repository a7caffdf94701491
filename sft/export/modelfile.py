"""Write an Ollama Modelfile whose Go template renders conversations as in training.

Ollama runs the template once over all messages: `.Messages` holds them, `.System` the text of the system messages,
joined. If a request has no system message, Ollama puts the Modelfile's SYSTEM line in front. The template ends with the
header of the reply.
"""

import json
from pathlib import Path

from sft.chat.sampling import BLOSSOM
from sft.export.merge import is_adapter
from sft.export.output import stage_output
from sft.files import write_text
from sft.format.render import Renderer
from sft.format.table import CHAT_FORMATS, ChatFormat, bind_format
from sft.model.load import load_config, load_tokenizer

OLLAMA_MODEL_TYPES = ("llama", "qwen2")  # whose safetensors it imports
# The characters that str.strip removes, by their bytes in UTF-8: Go's templates have no trim, but slice by bytes.
SPACES = {1: "\t\n\v\f\r\x1c\x1d\x1e\x1f ", 2: "\x85\xa0", 3: "\u1680\u2028\u2029\u202f\u205f\u3000"}
SPACES[3] += "".join(map(chr, range(0x2000, 0x200B)))


def export_modelfile(model_path: str, output_dir: str, gguf: str | None = None) -> None:
    """Write a Modelfile into the new folder `output_dir`, for a GGUF or for the model folder itself."""
    if gguf and not Path(gguf).is_file():
        raise ValueError(f"--gguf {gguf}: no such file")
    if not gguf and (is_adapter(model_path) or load_config(model_path).model_type not in OLLAMA_MODEL_TYPES):
        types = " and ".join(OLLAMA_MODEL_TYPES)
        raise ValueError(f"--model_path {model_path}: Ollama imports full models of type {types} only; use --gguf FILE")
    weights = Path(gguf or model_path).expanduser().absolute()
    text = write_modelfile(Renderer(load_tokenizer(model_path)), str(weights))
    with stage_output(output_dir) as staged:
        write_text(staged / "Modelfile", text)


def write_modelfile(renderer: Renderer, source: str) -> str:
    """Return the Modelfile for the weights in `source`: template, stop words, Blossom's sampling, system line.

    It has no num_predict, which would cap every reply. Raises ValueError for the format `base`, whose template is a
    Jinja program, and for text that a Modelfile can't quote.
    """
    if renderer.name not in CHAT_FORMATS:
        raise ValueError(
            f"chat format {renderer.name!r}: the base's own template is a Jinja program without an exact translation "
            "to Go; train with a format of the table (--chat_format chatml, ...), or serve with llama-server"
        )
    row = bind_format(CHAT_FORMATS[renderer.name], renderer.tokenizer)
    lines = [f"FROM {source}", f"TEMPLATE {quote_text(go_template(row))}"]
    lines += [f"SYSTEM {quote_text(row.default_system)}"] if row.default_system else []
    lines += [f"PARAMETER {name} {getattr(BLOSSOM, name)}" for name in ("temperature", "top_p", "top_k")]
    lines += [f"PARAMETER repeat_penalty {BLOSSOM.repetition_penalty}", "PARAMETER repeat_last_n -1"]
    stops = renderer.tokenizer.convert_ids_to_tokens(renderer.stop_ids)
    return "\n".join([*lines, *(f"PARAMETER stop {quote_text(stop)}" for stop in stops)]) + "\n"


def go_template(row: ChatFormat) -> str:
    """Return a bound chat format as a Go template with all text in quoted strings, which Go does not trim.

    It has no bos: llama.cpp's tokenizer adds it as the GGUF says.
    """
    default = ["else", *_go_strings(row.system[0], row.default_system, row.system[1])] if row.default_system else []
    system = [
        "if $.System",
        *_go_strings(row.system[0]),
        'template "strip" $.System',
        *_go_strings(row.system[1]),
        *default,
        "end",
    ]
    once = ["if $first", *system, "end", "$first = false"]
    actions = [
        *_define_strip(),
        *("$open := true", "$first := true"),
        *([] if row.system_in_user else system),
        "range .Messages",
        *('if eq .Role "user"', *_go_strings(row.user[0]), *(once if row.system_in_user else [])),
        *('template "strip" .Content', *_go_strings(row.user[1]), "$open = true"),
        *('else if eq .Role "assistant"', *_go_strings(row.header, row.gap)),
        *('template "strip" .Content', *_go_strings(row.end, row.between), "$open = false"),
        *("end", "end"),
        *("if $open", *_go_strings(row.header), "end"),
    ]
    return "".join(f"{{{{- {action} -}}}}\n" for action in actions)


def _go_strings(*texts: str) -> list[str]:
    return [json.dumps(text, ensure_ascii=False) for text in texts if text]


def _define_strip() -> list[str]:
    """Define templates that print a text without whitespace at its edges, removing one character a time.

    Go's templates have no arithmetic: the text without its last n bytes is as long as the one without its first n.
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


def quote_text(text: str) -> str:
    """Quote for a Modelfile, which has no escapes and drops characters that aren't printable, except newlines."""
    if '"""' in text or not text.replace("\n", "").isprintable():
        raise ValueError(f"a Modelfile can't hold {text[:40]!r}")
    return f'"""{text}"""'
