"""Write an Ollama Modelfile whose Go template renders conversations as in training.

Ollama runs the template once over all messages: `.Messages` holds them, `.System` the text of the system messages,
joined. If a request has no system message, Ollama puts the Modelfile's SYSTEM line in front. The template ends with the
header of the reply.
"""

from pathlib import Path

from sft.chat.sampling import BLOSSOM
from sft.export.merge import is_adapter
from sft.export.output import stage_output
from sft.files import write_text
from sft.format.render import Renderer
from sft.format.table import CHAT_FORMATS, ChatFormat, bind_format
from sft.format.template import load_marked_template
from sft.model.load import load_config, load_tokenizer

OLLAMA_MODEL_TYPES = ("llama", "qwen2")  # whose safetensors it imports


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
    """Return a bound chat format as a Go template. It has no bos: llama.cpp's tokenizer adds it as the GGUF says."""
    lines = load_marked_template(Path(__file__).with_name("modelfile.jinja")).render(row=row).split("\n")
    return "".join(f"{line.strip()}\n" for line in lines if line.strip())


def quote_text(text: str) -> str:
    """Quote for a Modelfile, which has no escapes and drops characters that aren't printable, except newlines."""
    if '"""' in text or not text.replace("\n", "").isprintable():
        raise ValueError(f"a Modelfile can't hold {text[:40]!r}")
    return f'"""{text}"""'
