"""The curves show the figures that they are given."""

import math

import numpy as np
import pytest

from wgan_fast.errors import InputError

pytest.importorskip("matplotlib")
pytest.importorskip("PIL")

from matplotlib.colors import to_rgb
from PIL import Image

from wgan_fast.training import curves


def run_records(n):
    rng = np.random.default_rng(0)
    for step in range(0, 10 * n, 10):
        record = {
            key: rng.normal()
            for panel in curves._PANELS
            for key in (curve.key for curve in panel.curves)
            if key != "held_out_wasserstein"
        }
        if step % 100 == 0:
            record["held_out_wasserstein"] = rng.normal()
        yield record | {"step": step, "elsewhere": "not a number"}


def panel_titles(figure) -> list[str]:
    return [axes.get_title(loc="left") for axes in figure.axes]


def test_curves_show_every_figure_of_the_records_with_its_steps(tmp_path, drawn):
    records = list(run_records(50))
    curves.save_curves(records, tmp_path / "curves.png", title="a run", target=1.0)
    (figure,) = drawn
    assert panel_titles(figure) == [panel.title for panel in curves._PANELS]
    assert figure.get_suptitle() == "a run"
    for axes, panel in zip(figure.axes, curves._PANELS):
        lines = {line.get_label(): line for line in axes.lines}
        for curve in panel.curves:
            expected = [(r["step"], r[curve.key]) for r in records if curve.key in r]
            np.testing.assert_array_equal(lines[curve.label].get_xydata(), expected)
            assert to_rgb(lines[curve.label].get_color()) == to_rgb(curve.colour)
    norm = next(axes for axes in figure.axes if axes.get_title(loc="left").startswith("Gradient norm"))
    target = next(line for line in norm.lines if line.get_label() == "target 1")
    assert list(target.get_ydata()) == [1.0, 1.0]
    assert norm.get_ylim()[0] < 1 < norm.get_ylim()[1]


def test_long_curves_are_drawn_raw_and_smoothed(tmp_path, drawn):
    steps = np.arange(1000)
    values = np.where(steps % 2, 1.0, 3.0) + steps
    curves.save_curves([{"step": int(s), "penalty": v} for s, v in zip(steps, values)], tmp_path / "curves.png")
    raw, smooth = drawn[0].axes[0].lines
    np.testing.assert_array_equal(raw.get_ydata(), values)
    inner = (smooth.get_xdata() >= 25) & (smooth.get_xdata() < 975)  # whole windows
    residual = smooth.get_ydata() - smooth.get_xdata() - 2
    # Of the +-1 about the line, what one value more of one kind leaves in the 27 of a window's middle half.
    assert np.abs(residual[inner]).max() < 2 / 27


def test_missing_and_non_finite_values_are_left_out(tmp_path, drawn):
    records = [
        {"step": 3, "critic_loss": 1.0, "penalty": None},
        {"step": 1, "critic_loss": 2.0},
        {"step": 2, "critic_loss": math.nan},
        {"step": 4, "critic_loss": math.inf},
        {"critic_loss": 5.0},
    ]
    curves.save_curves(records, tmp_path / "curves.png")
    assert panel_titles(drawn[0]) == ["Losses"]
    np.testing.assert_array_equal(drawn[0].axes[0].lines[0].get_xydata(), [[1, 2.0], [3, 1.0]])


def test_a_spike_of_the_first_steps_does_not_flatten_the_curve(tmp_path, drawn):
    values = [1e6, 1e5, 1e4] + [math.sin(step / 50) for step in range(997)]
    curves.save_curves([{"step": s, "critic_loss": v} for s, v in enumerate(values)], tmp_path / "curves.png")
    low, high = drawn[0].axes[0].get_ylim()
    assert -2 < low < -1
    assert 1 < high < 2


def test_early_points_beyond_the_frame_are_marked_with_their_extreme(tmp_path, drawn):
    """Also where there are few values: two of sixty."""
    values = [1000.0, 900.0] + [math.sin(step) for step in range(58)]
    records = [{"step": s, "critic_loss": v, "generator_loss": -20 * v} for s, v in enumerate(values)]
    curves.save_curves(records, tmp_path / "curves.png")
    axes = drawn[0].axes[0]
    assert max(abs(limit) for limit in axes.get_ylim()) < 60
    assert {text.get_text(): text.xy[0] for text in axes.texts} == {"1,000": 0, "−20,000": 0}
    edges = {line.get_marker(): line.get_ydata()[0] for line in axes.lines if line.get_marker() in "^v"}
    assert (edges["v"], edges["^"]) == axes.get_ylim()


def test_nothing_is_marked_where_everything_is_in_the_frame(tmp_path, drawn):
    curves.save_curves([{"step": s, "critic_loss": math.sin(s)} for s in range(60)], tmp_path / "curves.png")
    assert list(drawn[0].axes[0].texts) == []


def test_a_learning_rate_that_stays_the_same_is_said_in_the_title(tmp_path, drawn):
    records = [{"step": s, "critic_loss": 1.0, "learning_rate": 0.5} for s in (1, 2)]
    curves.save_curves(records, tmp_path / "curves.png", title="a run")
    curves.save_curves([*records, {"step": 3, "learning_rate": 0.25}], tmp_path / "curves.png", title="a run")
    assert [panel_titles(figure) for figure in drawn] == [["Losses"], ["Losses", "Learning rate"]]
    assert [figure.get_suptitle() for figure in drawn] == ["a run, learning rate 0.5", "a run"]


def test_a_long_title_fits_the_figure(tmp_path, drawn):
    curves.save_curves([{"step": 1, "critic_loss": 1.0}], tmp_path / "curves.png", title="wgan-gp on " + "long/" * 90)
    (figure,) = drawn
    assert figure._suptitle.get_window_extent().x1 < figure.bbox.x1
    assert figure.get_suptitle().startswith("wgan-gp on long")


def test_no_legend_lies_over_a_line(tmp_path, drawn):
    records = [{"step": s, "wasserstein": s, "held_out_wasserstein": s, "frechet_distance": s} for s in range(1, 9)]
    curves.save_curves(records, tmp_path / "curves.png")
    axes = drawn[0].axes[0]
    assert axes.get_legend().get_window_extent().y0 >= axes.bbox.y1


def test_an_outlying_curve_with_few_points_stays_in_the_frame(tmp_path, drawn):
    records = [{"step": s, "wasserstein": 1.0} for s in range(1000)]
    records += [{"step": s, "held_out_wasserstein": 50.0} for s in (0, 999)]
    curves.save_curves(records, tmp_path / "curves.png")
    assert drawn[0].axes[0].get_ylim()[1] > 50


@pytest.mark.parametrize("n", [1, 2])
def test_curves_of_very_short_runs_can_be_drawn(tmp_path, recwarn, n):
    curves.save_curves(run_records(n), tmp_path / "curves.png", target=0.0)
    with Image.open(tmp_path / "curves.png") as image:
        assert np.asarray(image).std() > 1
    assert [str(warning.message) for warning in recwarn] == []


@pytest.mark.parametrize("records", [[], [{"step": 1}], [{"critic_loss": 1.0}], [{"step": 1, "penalty": None}]])
def test_curves_without_figures_are_refused(tmp_path, records):
    with pytest.raises(InputError, match="at least one step with a finite value"):
        curves.save_curves(records, tmp_path / "curves.png")


# Tracked quality


def test_rank_correlation_is_that_of_scipy():
    stats = pytest.importorskip("scipy.stats")
    rng = np.random.default_rng(0)
    for a, b in ((rng.normal(size=33), rng.normal(size=33)), rng.integers(4, size=(2, 63)).astype(float)):
        assert curves._rank_correlation(a, b) == pytest.approx(stats.spearmanr(a, b).statistic, rel=1e-12)
    assert curves._rank_correlation(np.arange(2.0), np.arange(2.0)) is None
    assert curves._rank_correlation(np.arange(5.0), np.zeros(5)) is None


def tracked(key, *, rising=False):
    """An estimate that falls with noise that its mean is free of, and a distance tracked at every tenth step."""
    records = [{"step": step, "wasserstein": 100 - step + 30 * (-1) ** step} for step in range(1, 101)]
    for record in records[9::10]:
        record[key] = record["step"] if rising else 1000 / record["step"]
    return records


@pytest.mark.parametrize(
    ("key", "label"),
    [("frechet_distance", "Fréchet distance"), ("sliced_wasserstein", "sliced Wasserstein distance")],
)
@pytest.mark.parametrize("rising", [False, True])
def test_tracked_quality_is_drawn_with_its_rank_correlation(tmp_path, drawn, key, label, rising):
    curves.save_curves(tracked(key, rising=rising), tmp_path / "curves.png")
    axes = [axes for axes in drawn[0].axes if axes.get_ylabel() == label]
    np.testing.assert_array_equal(axes[0].lines[0].get_xdata(), np.arange(10, 101, 10))
    expected = np.arange(10, 101, 10) if rising else 1000 / np.arange(10, 101, 10)
    np.testing.assert_allclose(axes[0].lines[0].get_ydata(), expected)
    title = f"Wasserstein estimate; Spearman's ρ with the {label}: {'-1.00' if rising else '1.00'} (10 points)"
    assert drawn[0].axes[0].get_title(loc="left") == title


def test_title_is_plain_where_quality_was_not_tracked(tmp_path, drawn):
    curves.save_curves([{"step": step, "wasserstein": 1.0 / step} for step in range(1, 9)], tmp_path / "curves.png")
    assert drawn[0].axes[0].get_title(loc="left") == "Wasserstein estimate"


def test_distance_of_zero_and_missing_values_are_drawn(tmp_path, drawn):
    records = tracked("frechet_distance")
    records[9]["frechet_distance"], records[19]["frechet_distance"] = 0.0, None
    curves.save_curves(records, tmp_path / "curves.png")
    assert "(9 points)" in drawn[0].axes[0].get_title(loc="left")
