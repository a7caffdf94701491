"""The shape of the project: import order, what must not exist, and the README's tree."""

import ast
import re
import statistics
import subprocess

import pytest

from tests.conftest import ROOT

# In the order of the flow; a folder imports only from itself and from those before it.
ORDER = [
    "files",
    "base",
    "embeddings",
    "tables",
    "workers",
    "opendata",
    "tiny",
    "format",
    "dataset",
    "model",
    "chat",
    "launch",
    "checkpoint",
    "report",
    "evaluate",
    "train",
    "preview",
    "export",
    "web",
]
# Beside each other, above `chat`: neither imports the other.
APART = {"export": {"evaluate", "train", "preview", "web"}, "web": {"evaluate", "train", "preview", "export"}}
LIGHT = ("opendata", "format")
HEAVY = {"torch", "transformers", "datasets", "pandas", "deepspeed", "accelerate", "peft", "gradio"}
MODULES = sorted((ROOT / "sft").glob("*/*.py"))
FOLDERS = sorted({path.parent.name for path in MODULES})


def tracked() -> list[str]:
    done = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.split("\n")[:-1]


def imports(path) -> set[str]:
    """Modules that a file imports, at its top level or inside a function."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module == "sft":
            names |= {f"sft.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module or "")
    return names


@pytest.mark.parametrize("path", MODULES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_a_folder_imports_only_from_those_before_it(path):
    folder = path.parent.name
    ours = {name.split(".")[1] for name in imports(path) if name.startswith("sft.")} - {folder, "reexport"}
    assert ours <= set(ORDER[: ORDER.index(folder)]) - APART.get(folder, set())
    assert not {"train", "web_demo"} & imports(path)


@pytest.mark.parametrize("folder", LIGHT)
def test_the_data_side_starts_without_torch_and_transformers(folder):
    for path in (ROOT / "sft" / folder).glob("*.py"):
        assert not {module.split(".")[0] for module in imports(path)} & HEAVY, path


@pytest.mark.parametrize("folder", FOLDERS)
def test_a_folder_has_at_most_eight_modules_and_an_init_that_only_re_exports(folder):
    names = {path.name for path in (ROOT / "sft" / folder).glob("*.py")} - {"__init__.py", "__main__.py"}
    assert len(names) <= 8
    tree = ast.parse((ROOT / "sft" / folder / "__init__.py").read_text(encoding="utf-8"))
    for node in tree.body:
        assert isinstance(node, ast.ImportFrom | ast.Expr | ast.Assign), ast.dump(node)


def test_forbidden_names_are_absent():
    names = [path.rsplit("/")[-1] for path in tracked()]
    assert not [name for name in names if name in ("utils.py", "common.py", "helpers.py")]
    assert not [name for name in names if re.search(r"_(old|v2)\.", name)]
    assert not [path for path in tracked() if re.match(r"sft/.+/.+/", path) and path.endswith(".py")]
    for path in [*MODULES, ROOT / "train.py", ROOT / "web_demo.py"]:
        text = path.read_text(encoding="utf-8")
        assert not re.search(r"class \w*(Config|Manager|Factory|Registry)\b", text), path
        assert "trust_remote_code=True" not in text, path


@pytest.mark.parametrize("path", MODULES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_a_module_has_at_most_400_lines(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 400


def test_the_scripts_stay_short():
    for name, limit in (("train.py", 350), ("web_demo.py", 120), ("README.md", 200), ("README.zh.md", 200)):
        assert len((ROOT / name).read_text(encoding="utf-8").splitlines()) <= limit, name


def test_functions_stay_short():
    sizes = []
    for path in [*MODULES, ROOT / "train.py", ROOT / "web_demo.py"]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef):
                sizes.append(node.end_lineno - node.lineno + 1)
    assert statistics.median(sizes) <= 15
    assert max(sizes) <= 80


def test_each_published_text_of_a_format_has_one_home():
    for literal in ("|Bot|:", "### Response", "<|im_start|>assistant", "[/INST]"):
        homes = [path.name for path in MODULES if literal in path.read_text(encoding="utf-8")]
        assert "table.py" in homes and set(homes) <= {"table.py", "cleaning.py"}, literal


@pytest.mark.parametrize("name", ["README.md", "README.zh.md"])
def test_the_readme_has_a_line_for_each_folder(name):
    """folder = command = README line = docs page = tests folder"""
    text = (ROOT / name).read_text(encoding="utf-8")
    rows = re.findall(r"^\| `([\w/]+)/` \| .+ \| `([^`]+)` \| \[[^]]+\]\((docs/[^)#]+)\S*\) \|$", text, re.MULTILINE)
    listed = {folder for folder, _command, _page in rows}
    assert {folder for folder in listed if folder.startswith("sft/")} == {f"sft/{folder}" for folder in FOLDERS}
    top = {path.split("/")[0] for path in tracked() if "/" in path and not path.startswith(".")}
    assert {folder for folder in top - listed if f"`{folder}/" not in text} == set()
    for folder, command, page in rows:
        assert (ROOT / folder).is_dir() and (ROOT / page).is_file()
        if module := re.match(r"python -m (sft\.\w+)", command):
            assert (ROOT / module[1].replace(".", "/") / "__main__.py").is_file()
        if folder.startswith("sft/"):
            assert (ROOT / "tests" / folder.removeprefix("sft/")).is_dir()


@pytest.mark.parametrize("name", ["README.md", "README.zh.md"])
def test_the_readme_is_short(name):
    assert len((ROOT / name).read_text(encoding="utf-8").splitlines()) <= 200
