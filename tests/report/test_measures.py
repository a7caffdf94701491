"""Measures of replies and of speed."""

import pytest

from sft.report.measures import mfu_of_a_token, peak_flops, repetition


def test_repetition_is_the_share_of_four_grams_seen_before():
    assert repetition("") == 0
    assert repetition("the cat sat on the mat") == 0
    assert repetition("a b a b a b a b") == pytest.approx(3 / 5)
    assert repetition("春天来了春天来了") == pytest.approx(1 / 5)
    assert repetition("!" * 8) == pytest.approx(4 / 5)


def test_the_peak_of_a_device_is_known_by_its_name_or_not_at_all():
    names = ["NVIDIA A100-SXM4-80GB", "NVIDIA H100 80GB HBM3", "NVIDIA H100 PCIe", "NVIDIA H200", "NVIDIA L40S"]
    assert [peak_flops(name) for name in names] == [312e12, 989e12, 756e12, 989e12, 362e12]
    assert [peak_flops(name) for name in ("NVIDIA L4", "NVIDIA A10", "Tesla T4")] == [121e12, 125e12, 65e12]
    assert [peak_flops(name) for name in ("cpu", "NVIDIA A10G", "NVIDIA L40", "NVIDIA GB10")] == [None] * 4


def test_mfu_counts_six_flops_for_a_trained_parameter_and_none_for_looked_up_rows(tiny_base):
    from sft.model.load import count_parameters, load_model

    model = load_model(str(tiny_base("qwen2")))
    _trained, total = count_parameters(model)
    embedding = model.get_input_embeddings().weight
    counted = total if embedding is model.get_output_embeddings().weight else total - embedding.numel()
    found = mfu_of_a_token(model, device="NVIDIA H200", world_size=2)
    assert found == pytest.approx(6 * counted / (2 * 989e12))
    assert mfu_of_a_token(model, device="cpu", world_size=1) is None
