"""Charts of a run's log."""

import pytest

from sft.report.charts import choose_ticks, lay_out_chart, plot_losses


def test_the_loss_curve_is_a_picture_even_of_an_empty_history(tmp_path):
    history = [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.0}, {"step": 2, "eval_loss": 1.5}, {"step": 2, "x": 1}]
    for name, entries in (("full", history), ("empty", [])):
        plot_losses(entries, tmp_path / f"{name}.png")
        assert (tmp_path / f"{name}.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert (tmp_path / "full.png").stat().st_size > (tmp_path / "empty.png").stat().st_size


def test_a_chart_places_its_points_between_round_numbers():
    layout = lay_out_chart([(0, 0.0), (100, 1.0)], [(50, 0.5)])
    assert layout["lines"] == ["64.0,196.0 616.0,10.0 616.0,10.0", "340.0,103.0 340.0,103.0"]
    assert layout["dots"] == [(340.0, 103.0, "0.5", 50)]
    assert [label for _x, label in layout["across"]] == ["0", "20", "40", "60", "80", "100"]
    assert [label for _y, label in layout["up"]] == ["0", "0.2", "0.4", "0.6", "0.8", "1"]
    assert lay_out_chart([(1, 3.0)], low=0.0)["up"][0] == (196.0, "0")


@pytest.mark.parametrize(("low", "high"), [(0, 7), (3, 3.0001), (1e-6, 5e-6), (0, 123_456), (-0.5, 0.5)])
def test_an_axis_has_three_to_six_ticks_within_its_ends(low, high):
    found = choose_ticks(low, high)
    assert 3 <= len(found) <= 6
    assert low - 1e-9 <= found[0] and found[-1] <= high * (1 + 1e-9)
