"""The pages' sentences in Chinese: a template for each that the code can write."""

import ast
import re
import string
from collections.abc import Iterator

import pytest

from sft.report.templates import _load_patterns, find_chinese
from tests.conftest import ROOT

# The functions whose strings can come to a page; () stands for the whole module.
WRITERS = {
    "preview/activations.py": (),
    "preview/data.py": (),
    "preview/dry_run.py": (),
    "preview/measure.py": ("describe_measured", "format_duration"),
    "preview/memory.py": (),
    "preview/shape.py": (),
    "preview/twin.py": (),
    "dataset/ledger.py": (
        "ledger_lines",
        "count_outcome",
        "check_losses",
        "EXPLAINED",
        "LOST_OUTCOMES",
        "KEPT_OUTCOMES",
    ),
    "dataset/mixture.py": ("mixture_table", "mix"),
    "model/adapters.py": (
        *("NOT_OF_TEXT", "ROUTER", "table", "_dropout_note"),
        *("_reason_against", "prove_on_twin", "_try_alone", "_find_fault", "_try_adapters"),
    ),
    "base.py": ("find_difference",),
    "model/attention.py": ("isolate_documents", "_isolate_attention", "_use_masks_with_positions"),
    "model/loss.py": ("use_chunked_loss", "find_reason_against_chunks"),
    "train/callbacks.py": ("on_train_begin",),
    "model/load.py": ("check_window", "check_rows"),
    "opendata/conversation.py": (),
    "opendata/messages.py": (),
    "opendata/fields.py": (),
    "opendata/records.py": (),
    "opendata/files.py": ("describe_skipped",),
    "train/checks.py": ("check_held_out_metrics",),
    "train/setup.py": ("find_gpus", "find_named_checkpoint"),
    "checkpoint/resume.py": ("compare_fingerprints", "check_unchanged"),
    "checkpoint/manifest.py": ("find_checkpoint", "find_damage", "find_incomplete", "read_manifest"),
    "format/contract.py": ("check_contract", "_check_conversation", "choose_format", "judge_own_template"),
    "format/own_template.py": ("turns", "_reply", "_rest_after", "_up_to_stop", "_find_stop"),
    "format/render.py": (),
    "format/template.py": (),
    "format/reply.py": ("check_prompt", "check_reply"),
    "format/tokens.py": ("_check_boundaries",),
}
# Names in the code, and texts of other projects or of a terminal.
LEFT_OUT = (
    r"(sft\.|huggingface|github|arXiv|[./]|%|.* (7B|13B|65B|8B)\b|--gpu A1$|<no input>$|\\s\*|tokenizers, with"
    r"|documents are kept apart$|row was$|rows were$).*|\S*"
)


def strings_of(module: str, names: tuple[str, ...]) -> Iterator[str]:
    """Yield the strings of two words or more of some definitions of a module, with `A1` for each value in them."""
    tree = ast.parse((ROOT / "sft" / module).read_text(encoding="utf-8"))
    found = [node for node in ast.walk(tree) if not names or _name_of(node) in names]
    assert names == () or {_name_of(node) for node in found} == set(names), f"{module}: definitions have moved"
    docstrings = {id(node.body[0].value) for node in ast.walk(tree) if _has_docstring(node)}
    parts = {id(value) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for value in ast.walk(node)}
    parts -= {id(node) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr)}
    for top in found:
        for node in ast.walk(top):
            if isinstance(node, ast.JoinedStr):
                yield "".join(value.value if isinstance(value, ast.Constant) else "A1" for value in node.values)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings | parts:
                yield node.value


def _name_of(node: ast.AST) -> str:
    if isinstance(node, ast.Assign):
        return ast.unparse(node.targets[0]).split(",")[0].strip("( ")
    return getattr(node, "name", "") if isinstance(node, ast.FunctionDef) else ""


def _has_docstring(node: ast.AST) -> bool:
    return isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node) is not None


@pytest.mark.parametrize("module", WRITERS)
def test_each_sentence_of_the_code_has_its_chinese(module):
    texts = {text.lstrip("; ") for text in strings_of(module, WRITERS[module]) if " " in text.strip()}
    texts = {text for text in texts if not re.fullmatch(LEFT_OUT, text) and re.search("[a-z]{2}", text)}
    assert [text for text in sorted(texts) if find_chinese(text) is None] == []


def test_chinese_has_only_holes_of_its_english():
    for pattern, chinese in _load_patterns():
        holes = {name for _text, name, _form, _conversion in string.Formatter().parse(chinese) if name}
        assert holes <= set(pattern.groupindex), chinese


@pytest.mark.parametrize(
    "english, chinese",
    [
        ("memory: all weights, ZeRO-3 with offload", "显存：全部权重，ZeRO-3 并卸载到内存"),
        (
            "  lost, not a conversation: 3 (unknown_role 3; first: a.json line 7)",
            "  丢失，不是对话：3 条（unknown_role 3; 首例：a.json 第 7 行）",
        ),
        (
            "longest, most replies: row 5 of a, 20 tokens, 5 trained",
            "最长，回复最多：a 的第 5 行，20 个 token，其中 5 个参与训练",
        ),
        ("4 bytes (summed in fp32) x 7B / 8", "4 字节（以 fp32 求和）× 7B / 8"),
        ("a sentence of another project", None),
    ],
)
def test_values_in_a_sentence_are_translated_too(english, chinese):
    assert find_chinese(english) == chinese
