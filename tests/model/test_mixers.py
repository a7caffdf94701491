"""Mixers with CUDA kernels get the documents as the kernels take them, or run once per document.

No kernel runs on a CPU. Fake packages stand in for the real ones in transformers' own lookup: their functions have the
names and document parameters of the real ones, record the documents that they get, and compute each one in Python.
"""

import importlib
import inspect
import re
import sys
from types import SimpleNamespace

import pytest
import torch
from transformers.integrations.hub_kernels import use_kernel_func_from_hub_with_fallback

from benchmarks.families import build_model
from sft.model import attention, mixers
from sft.model.adapters import add_lora, plan_adapters

LENGTHS = (37, 5, 64, 23)  # no other side of a tensor is as long as the row, or as the first document
EDGES = [0, 37, 42, 106, 129]
NUMBERS = [0] * 37 + [1] * 5 + [2] * 64 + [3] * 23
TWO_ROWS = (37, 5, 20, 50, 12)
# The functions of the packages, and the parameter that takes documents: causal_conv1d 1.5, fla 0.4, mamba_ssm 2.2.
KERNELS = {
    "causal_conv1d": {"causal_conv1d_fn": "seq_idx"},
    "fla": {"ops.gated_delta_rule.chunk_gated_delta_rule": "cu_seqlens", "ops.kda.chunk_kda": "cu_seqlens"},
    "mamba_ssm": {
        "ops.triton.ssd_combined.mamba_chunk_scan_combined": "seq_idx",
        "ops.triton.ssd_combined.mamba_split_conv1d_scan_combined": "seq_idx",  # in training; here it gives None
        "ops.selective_scan_interface.mamba_inner_fn": None,
        "ops.selective_scan_interface.selective_scan_fn": None,
    },
}
CONVOLUTION = ("causal_conv1d_fn", NUMBERS)
DELTA = ("chunk_gated_delta_rule", EDGES)
SCAN = ("mamba_chunk_scan_combined", NUMBERS)
MODELS = {
    "qwen3_next": [CONVOLUTION, DELTA],
    "qwen3_5_text": [CONVOLUTION, DELTA],
    "olmo_hybrid": [CONVOLUTION, DELTA],
    "kimi_linear": [CONVOLUTION, ("chunk_kda", EDGES)],
    "lfm2": [CONVOLUTION],
    "mamba2": [CONVOLUTION, SCAN],
    "bamba": [CONVOLUTION, SCAN],
    "falcon_h1": [CONVOLUTION, SCAN],
    "nemotron_h": [CONVOLUTION, SCAN],
    "granitemoehybrid": [CONVOLUTION, SCAN],
    "zamba2": [CONVOLUTION, SCAN],
}
QUICK = ("qwen3_next", "lfm2", "mamba2")


class FakeKernels:
    """Makes the functions of packages out of transformers' Python ones; `calls` are (name, its documents or None)."""

    def __init__(self):
        self.calls: list[tuple[str, list[int] | None]] = []

    def make(self, name: str, parameter: str | None, in_python):
        def kernel(*args, **kwargs):
            documents = kwargs.pop(parameter, None) if parameter else None
            self.calls.append((name, None if documents is None else documents.flatten().tolist()))
            if documents is None:
                return in_python(*args, **kwargs)
            parts = []
            for number in range(len(LENGTHS)):
                of_document = {name: _split(value, number) for name, value in kwargs.items()}
                parts.append(in_python(*(_split(value, number) for value in args), **of_document))
            if isinstance(parts[0], tuple):
                return _join([part[0] for part in parts]), None
            return None if parts[0] is None else _join(parts)

        known = inspect.signature(in_python).parameters.values()
        given = [inspect.Parameter(parameter, inspect.Parameter.KEYWORD_ONLY)] if parameter else []
        kernel.__signature__ = inspect.Signature([*(one for one in known if one.kind is not one.VAR_KEYWORD), *given])
        return kernel


def _split(value, number: int):
    """Return a document's part of a tensor that has the row's length on a side."""
    sides = [side for side, size in enumerate(getattr(value, "shape", ())) if size == sum(LENGTHS)]
    return value.split(LENGTHS, sides[0])[number] if sides else value


def _join(parts):
    side = next(side for side, size in enumerate(parts[0].shape) if size == LENGTHS[0])
    return torch.cat(parts, side)


@pytest.fixture
def install(monkeypatch):
    """Return a function that installs packages of kernels for a type of model, and returns their FakeKernels."""

    def install_for(kind: str, packages) -> FakeKernels:
        kernels = FakeKernels()
        modeling = importlib.import_module(type(build_model(kind)).__module__)
        for function in [found for found in vars(modeling).values() if inspect.isfunction(found)]:
            pattern = r'@use_kernel_func_from_hub_with_fallback\("(\w+)", "(\w+)"\)'
            name, package = ([*re.findall(pattern, inspect.getsource(function)), ("", "")])[0]
            paths = [path for path in KERNELS.get(package, ()) if path.split(".")[-1] == name]
            if package in packages and paths:
                fake = kernels.make(name, KERNELS[package][paths[0]], inspect.unwrap(function))
                root = sys.modules.get(package)
                root = root if isinstance(root, SimpleNamespace) else SimpleNamespace(__spec__=None)
                monkeypatch.setitem(sys.modules, package, root)
                *folders, _name = paths[0].split(".")
                for folder in folders:
                    root.__dict__.setdefault(folder, SimpleNamespace())
                    root = getattr(root, folder)
                setattr(root, name, fake)
                looked_up = use_kernel_func_from_hub_with_fallback(name, package)(inspect.unwrap(function))
                monkeypatch.setattr(modeling, function.__name__, looked_up)
        monkeypatch.setattr(mixers, "has_kernels", lambda _device: True)
        return kernels

    return install_for


def gradient_distance(model) -> float:
    return attention.compare_gradients(model, LENGTHS, seed=3)


@pytest.mark.parametrize(
    "kind", [kind if kind in QUICK else pytest.param(kind, marks=pytest.mark.slow) for kind in MODELS]
)
def test_kernels_get_the_documents_and_the_gradient_is_that_of_the_documents_alone(install, kind):
    model = build_model(kind)
    attention.isolate_documents(model)
    kernels, notes = install(kind, KERNELS), []
    attention.self_test(model, lengths=LENGTHS, say=notes.append)
    assert notes == []
    if SCAN in MODELS[kind]:
        assert ("mamba_split_conv1d_scan_combined", NUMBERS) in kernels.calls
    kernels.calls.clear()
    assert gradient_distance(model) < 1e-6
    with_documents = [call for call in kernels.calls if call[1] is not None]
    assert len(with_documents) >= len(MODELS[kind])
    assert all(call in MODELS[kind] for call in with_documents)
    assert {name for name, _documents in with_documents} == {name for name, _documents in MODELS[kind]}


def test_two_packed_rows_are_one_row_for_the_kernels(install, monkeypatch):
    model = build_model("qwen3_next")
    attention.isolate_documents(model)
    positions = torch.cat([torch.arange(length) for length in TWO_ROWS])
    rows = {"input_ids": torch.arange(3, 127).view(2, 62), "position_ids": positions.view(2, 62)}
    with torch.no_grad():
        expected = model(**rows).logits
        monkeypatch.setattr(sys.modules[__name__], "LENGTHS", TWO_ROWS)
        calls = install("qwen3_next", KERNELS).calls
        found = model(**rows).logits
    assert float((found - expected).norm() / expected.norm()) < 1e-6
    assert ("chunk_gated_delta_rule", [0, 37, 42, 62, 112, 124]) in calls


def test_kernels_that_take_no_documents_are_left_out_by_the_self_test(install):
    model = build_model("mamba")
    attention.isolate_documents(model)
    kernels, notes = install("mamba", KERNELS), []
    attention.self_test(model, lengths=LENGTHS, say=notes.append)
    assert notes == ["the installed kernels don't keep documents apart in MambaMixer: once per document instead"]
    assert kernels.calls and gradient_distance(model) < 1e-6


def test_a_missing_package_leaves_the_kernels_out_and_stops_no_run(install):
    model = build_model("mamba2")
    attention.isolate_documents(model)
    notes = []
    install("mamba2", ["causal_conv1d"])
    attention.self_test(model, lengths=LENGTHS, say=notes.append)
    assert notes == ["the installed kernels don't keep documents apart in Mamba2Mixer: once per document instead"]
    assert gradient_distance(model) < 1e-6


def test_a_kernel_that_takes_plain_weights_is_not_used_where_they_are_adapted(monkeypatch):
    model = build_model("bamba")
    modeling, calls = sys.modules[type(model).__module__], []
    monkeypatch.setattr(modeling, "mamba2_split_conv1d_scan_combined", lambda *_args, **_kwargs: calls.append(1))
    plan = plan_adapters(model, prove=False)
    assert "" in [group.left_out for group in plan.groups if group.name.endswith("mamba.out_proj")]
    model.train()(input_ids=torch.arange(3, 23)[None])
    assert calls
    calls.clear()
    add_lora(model, rank=2, alpha=4, dropout=0.0, plan=plan).train()(input_ids=torch.arange(3, 23)[None])
    assert not calls
