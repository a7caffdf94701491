"""Each kernel gives the attention that the whole masked square gives."""

import os

import numpy as np
import pytest
import torch

from sft.model import kernels
from sft.model.kernels import Documents, attend_flex, attend_one_by_one, attend_varlen, read_documents


def test_documents_are_read_as_written_out():
    documents = read_documents(torch.tensor([[0, 1, 2, 0, 1], [0, 1, 0, 1, 0]]), 2)
    assert documents.edges.tolist() == [0, 3, 5, 7, 9, 10]
    assert documents.edges.dtype == torch.int32
    assert documents.lengths == [3, 2, 2, 2, 1]
    assert read_documents(torch.arange(4)[None], 3).lengths == [4, 4, 4]


def states_of(tokens: int, heads: int, key_heads: int, size: int = 16) -> list[torch.Tensor]:
    random = torch.Generator().manual_seed(tokens)
    return [torch.randn(tokens, n, size, generator=random, requires_grad=True) for n in (heads, key_heads, key_heads)]


def by_hand(query, key, value, documents, *, scale, alibi=None):
    """Attention with the full masked matrix: the expected result of every kernel."""
    tokens, groups = len(query), query.shape[1] // key.shape[1]
    document = torch.repeat_interleave(torch.arange(len(documents.lengths)), torch.tensor(documents.lengths))
    position = torch.arange(tokens) - documents.edges.long()[document]
    key, value = (states.repeat_interleave(groups, dim=1) for states in (key, value))
    scores = torch.einsum("qhd,khd->hqk", query, key) * scale
    if alibi is not None:
        scores = scores + alibi[:, position][:, None, :]
    distance = torch.arange(tokens)[:, None] - torch.arange(tokens)[None, :]
    seen = (document[:, None] == document[None, :]) & (distance >= 0) & (distance < (documents.window or tokens))
    return torch.einsum("hqk,khd->qhd", scores.masked_fill(~seen, -np.inf).softmax(-1), value)


def assert_same_attention(attend, states, documents, **options) -> None:
    weights = torch.randn(states[0].shape, generator=torch.Generator().manual_seed(0))
    results = []
    for way in (attend, by_hand):
        output = way(*states, documents, **options)
        results.append([output.detach(), *torch.autograd.grad((output * weights).sum(), states)])
    for found, expected in zip(*results, strict=True):
        assert float((found - expected).abs().max()) < 1e-5


def documents_of(lengths, window: int | None = None) -> Documents:
    edges = np.concatenate([[0], np.cumsum(lengths)])
    return Documents(torch.tensor(edges, dtype=torch.int32), list(lengths), window)


SPLITS = [[128], [129, 1, 126], [7, 300, 2, 2, 131], [1] * 40]


@pytest.mark.parametrize("lengths", SPLITS, ids=lambda lengths: f"{len(lengths)}-documents")
@pytest.mark.parametrize("window", [None, 1, 6, 100])
@pytest.mark.parametrize("key_heads", [1, 2, 4])
def test_one_by_one_is_exact(lengths, window, key_heads):
    states = states_of(sum(lengths), 4, key_heads)
    assert_same_attention(attend_one_by_one, states, documents_of(lengths, window), scale=0.3)


@pytest.mark.parametrize("lengths", SPLITS, ids=lambda lengths: f"{len(lengths)}-documents")
def test_alibi_is_exact_in_both_ways(lengths):
    alibi = torch.tensor([0.5, 0.25, 0.125, 0.06])[:, None] * torch.arange(max(lengths) + 3)
    states, options = states_of(sum(lengths), 4, 4), {"scale": 0.3, "alibi": alibi}
    assert_same_attention(attend_one_by_one, states, documents_of(lengths), **options)
    with torch.no_grad():  # torch has no backward of flex attention on a CPU
        found = attend_flex(*(state.detach() for state in states), documents_of(lengths), **options)
        assert float((found - by_hand(*states, documents_of(lengths), **options)).abs().max()) < 1e-5


@pytest.mark.parametrize("window", [None, 1, 6, 100, 128, 129, 300])
@pytest.mark.parametrize("lengths", [[7, 300, 2, 2, 131], [500]], ids=str)
def test_flex_attention_is_exact_without_alibi_too(lengths, window):
    """--full_determinism takes it on a GPU for every family."""
    documents = documents_of(lengths, window)
    states = [state.detach() for state in states_of(sum(lengths), 4, 2)]
    found = attend_flex(*states, documents, scale=0.3)
    assert float((found - by_hand(*states, documents, scale=0.3)).abs().max()) < 1e-5


@pytest.mark.parametrize(
    ("device", "dtype", "dropout", "alibi", "way", "way_if_deterministic"),
    [
        ("cpu", torch.float32, 0.0, False, "one by one", "one by one"),
        ("cpu", torch.bfloat16, 0.0, True, "one by one", "one by one"),
        ("cuda", torch.bfloat16, 0.0, False, "varlen", "flex"),
        ("cuda", torch.float16, 0.0, True, "flex", "flex"),
        ("cuda", torch.float32, 0.0, False, "one by one", "flex"),
        ("cuda", torch.bfloat16, 0.1, False, "one by one", "one by one"),
    ],
)
def test_the_way_of_attention_is_chosen(device, dtype, dropout, alibi, way, way_if_deterministic):
    options = {"dropout": dropout, "alibi": alibi}
    assert kernels.choose_attention(device, dtype, **options) == way
    torch.use_deterministic_algorithms(True)
    try:
        assert kernels.choose_attention(device, dtype, **options) == way_if_deterministic
    finally:
        torch.use_deterministic_algorithms(False)


def test_determinism_keeps_large_workspaces_and_waits_for_no_kernel(monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    monkeypatch.setenv("CUDA_LAUNCH_BLOCKING", "1")
    kernels.make_determinism_fast()
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    assert os.environ["CUDA_LAUNCH_BLOCKING"] == "0"


@pytest.mark.parametrize("window", [None, 1, 6, 128, 129, 200])
@pytest.mark.parametrize("lengths", SPLITS, ids=lambda lengths: f"{len(lengths)}-documents")
def test_the_block_mask_skips_other_documents_and_looks_at_no_token_of_whole_blocks(lengths, window):
    from torch.nn.attention.flex_attention import create_block_mask

    documents = documents_of(lengths, window)
    block_mask, position = kernels._block_mask(documents)
    assert position.tolist() == [p for length in lengths for p in range(length)]
    made = create_block_mask(block_mask.mask_mod, 1, 1, sum(lengths), sum(lengths), device="cpu")
    assert torch.equal(block_mask.to_dense(), made.to_dense())
    for found, expected in (("kv_num_blocks", "kv_indices"), ("full_kv_num_blocks", "full_kv_indices")):
        assert torch.equal(getattr(block_mask, found), getattr(made, found))
        for row, count in enumerate(getattr(made, found)[0, 0].tolist()):
            blocks = (getattr(mask, expected)[0, 0, row, :count].tolist() for mask in (block_mask, made))
            assert len({tuple(sorted(indices)) for indices in blocks}) == 1


@pytest.mark.parametrize("kind", ["torch", "torch without gqa", "flash_attn"])
@pytest.mark.parametrize("window", [None, 6])
def test_the_variable_length_kernel_is_called_with_the_right_arguments(monkeypatch, kind, window):
    """The kernels run on CUDA alone: a stand-in with their signature takes the arguments as they document them."""

    def compute(query, key, value, edges, longest, scale, window_size):
        assert edges.dtype == torch.int32 and longest == 300
        documents = documents_of(edges.diff().tolist(), None if window_size[0] < 0 else window_size[0] + 1)
        return by_hand(query, key, value, documents, scale=scale)

    def varlen_attn(q, k, v, edges, _edges, longest, _longest, *, scale=None, window_size=(-1, -1), enable_gqa=False):
        assert enable_gqa and window_size[1] == 0
        return compute(q, k, v, edges, longest, scale, window_size)

    def varlen_without_gqa(q, k, v, edges, _edges, longest, _longest, *, scale=None, window_size=(-1, -1)):
        assert q.shape == k.shape and window_size[1] == 0
        return compute(q, k, v, edges, longest, scale, window_size)

    def flash(q, k, v, edges, _edges, longest, _longest, softmax_scale=None, causal=False, window_size=(-1, -1)):
        assert causal
        return compute(q, k, v, edges, longest, softmax_scale, window_size), None

    kernel = {"torch": varlen_attn, "torch without gqa": varlen_without_gqa, "flash_attn": flash}[kind]
    monkeypatch.setattr(kernels, "_varlen_kernel", lambda: (kernel, kind != "flash_attn"))
    lengths = [5, 300, 2, 2, 31]
    assert_same_attention(attend_varlen, states_of(sum(lengths), 4, 2), documents_of(lengths, window), scale=0.3)


def test_torchs_variable_length_kernel_takes_what_we_pass():
    import inspect

    from torch.nn.attention.varlen import varlen_attn

    names = list(inspect.signature(varlen_attn).parameters)
    assert names[:7] == ["query", "key", "value", "cu_seq_q", "cu_seq_k", "max_q", "max_k"]
    assert {"scale", "window_size"} <= set(names)
