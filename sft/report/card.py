"""The model card of a finished run, with the licence notes of its data."""

import json
import re
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from huggingface_hub import ModelCardData

from sft.files import write_text
from sft.opendata.cleaning import has_han
from sft.report.provenance import PROJECT
from sft.report.run_page import name_of
from sft.report.templates import load_template

CARD = "README.md"
OUR_CARD = "<!-- written by train.py -->"
# As the publishers say; the README's paragraph on licences.
LICENCES = {
    "blossom": "Apache-2.0",
    "belle": "its repository says research use only, its hub pages GPL-3.0; clear that before you ship the model",
}


def write_card(folder: Path, run: dict) -> bool:
    """Write the model card; return False, and leave the file alone, when somebody else wrote one."""
    path = Path(folder) / CARD
    if path.exists() and OUR_CARD not in path.read_text(encoding="utf-8", errors="replace"):
        return False
    write_text(path, render_card(run, folder=str(folder)))
    return True


def render_card(run: dict, *, folder: str) -> str:
    """Return the model card of a finished run, as Markdown with the head that the Hugging Face hub reads."""
    lora = bool(run["settings"].get("lora"))
    head = ModelCardData(
        base_model=run["model"] if re.fullmatch(r"[\w.-]+(/[\w.-]+)?", run["model"]) else None,
        language=languages(text for reply in run["replies"] for text in reply["answers_in_data"]),
        library_name="peft" if lora else "transformers",
        license="unknown",
        pipeline_tag="text-generation",
        tags=["sft", "conversational", *(["lora"] if lora else [])],
    )
    return load_template("model_card.md").render(
        head=head.to_yaml(),
        mark=OUR_CARD,
        run=run,
        lora=lora,
        folder=folder,
        name=name_of(Path(folder)),
        licences=licences(run["data"]["train"]),
    )


def languages(texts: Iterable[str]) -> list[str] | None:
    """Return zh and en as far as texts have Chinese characters, or Latin words alone; None for no text."""
    texts = list(texts)
    chinese = any(map(has_han, texts))
    english = any(re.search(r"[A-Za-z]{2}", text) and text.isascii() for text in texts)
    return [*(["zh"] if chinese else []), *(["en"] if english else [])] or None


def licences(files: Iterable[str]) -> dict[str, str]:
    """Return what is known of the licence of each source, found by its name alone, as `sft.opendata` noted it."""
    names = {}
    for file in files:
        ledger = Path(file).with_name("ledger.json")
        with suppress(OSError, ValueError, AttributeError):
            names |= dict.fromkeys(json.loads(ledger.read_text(encoding="utf-8"))["files"])
        if not ledger.is_file():
            names[file] = None
    sample = {path.name for path in (PROJECT / "data_proj" / "sample").glob("*.json*")}
    return {name: _licence(name, sample) for name in names}


def _licence(name: str, sample: set[str]) -> str:
    if Path(name).name in sample:
        return "the sample of the training toolkit, its own"
    return next((text for key, text in LICENCES.items() if key in name.lower()), "unknown")
