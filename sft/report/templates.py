"""Jinja templates of the run page and the model card, with their filters."""

import shlex
from functools import lru_cache
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from sft.report.markdown import cell, fence, short


@lru_cache
def load_template(name: str):
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=name.endswith(".html"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"short": short, "fence": fence, "cell": cell, "shell": shlex.join}
    return environment.get_template(name)
