"""The pictures show the samples and figures that they are given."""

import math
import subprocess
import sys

import numpy as np
import pytest
import torch

from wgan_fast.errors import InputError

pytest.importorskip("matplotlib")
pytest.importorskip("PIL")

from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from PIL import Image

from wgan_fast.training import plots


def pixels(path) -> np.ndarray:
    with Image.open(path) as image:
        assert image.format == "PNG"
        return np.asarray(image.convert("RGB")).astype(int)


def flat_images(greys, channels=1, height=28, width=28) -> torch.Tensor:
    """One image of a single grey in [-1, 1] for each entry."""
    return torch.tensor(greys).reshape(-1, 1, 1, 1).expand(-1, channels, height, width)


def cell_colours(path, columns, pitch_x, pitch_y, count) -> list[tuple[int, ...]]:
    """Colours at the middle of the cells' images, for cells of 56x56 pixels and gaps of 4."""
    picture = pixels(path)
    return [
        tuple(picture[4 + row * pitch_y + 28, 4 + column * pitch_x + 28])
        for row, column in (divmod(index, columns) for index in range(count))
    ]


def test_grid_shows_every_image_in_its_order_row_by_row(tmp_path):
    greys = [-1.0, -0.5, 0.0, 0.5, 1.0]
    plots.save_grid(flat_images(greys), tmp_path / "grid.png", columns=3)
    expected = [(round((grey + 1) * 127.5),) * 3 for grey in greys]
    assert cell_colours(tmp_path / "grid.png", 3, 60, 60, 5) == expected
    assert pixels(tmp_path / "grid.png").shape == (4 + 2 * 60, 4 + 3 * 60, 3)
    assert (pixels(tmp_path / "grid.png")[64:, 124:] == 255).all()  # the sixth cell is empty


def test_every_pixel_is_enlarged_by_a_whole_factor(tmp_path):
    torch.manual_seed(0)
    image = torch.rand(1, 3, 8, 8) * 2 - 1
    plots.save_grid(image, tmp_path / "grid.png", columns=5)
    expected = ((image[0] + 1) * 127.5).round().int().permute(1, 2, 0).numpy()
    expected = expected.repeat(8, axis=0).repeat(8, axis=1)
    picture = pixels(tmp_path / "grid.png")
    assert picture.shape == (64 + 8, 64 + 8, 3)
    np.testing.assert_array_equal(picture[4:68, 4:68], expected)


def test_large_images_keep_their_size(tmp_path):
    plots.save_grid(torch.zeros(1, 1, 200, 100), tmp_path / "grid.png", columns=1)
    assert pixels(tmp_path / "grid.png").shape == (208, 108, 3)


def test_values_outside_the_range_saturate_and_nan_is_black(tmp_path):
    plots.save_grid(flat_images([-7.0, 7.0, math.nan, math.inf]), tmp_path / "grid.png", columns=4)
    assert cell_colours(tmp_path / "grid.png", 4, 60, 60, 4) == [(0,) * 3, (255,) * 3, (0,) * 3, (255,) * 3]


def test_channels_that_are_not_colours_stand_side_by_side(tmp_path):
    image = torch.tensor([-1.0, 0.0]).reshape(1, 2, 1, 1).expand(1, 2, 32, 32)
    plots.save_grid(image, tmp_path / "grid.png", columns=1)
    picture = pixels(tmp_path / "grid.png")[4:-4, 4:-4]
    assert picture.shape == (32, 64, 3)
    assert (picture[:, :32] == 0).all()
    assert (picture[:, 32:] == 128).all()


def test_scored_grid_is_sorted_with_the_highest_first_and_captioned(tmp_path):
    greys, scores = [-1.0, -0.5, 0.0, 0.5], [0.1, math.nan, 3.0, 2.0]
    plots.save_grid(flat_images(greys), tmp_path / "grid.png", columns=2, scores=torch.tensor(scores))
    order = [2, 3, 0, 1]  # NaN last
    expected = [(round((greys[index] + 1) * 127.5),) * 3 for index in order]
    assert cell_colours(tmp_path / "grid.png", 2, 60, 75, 4) == expected
    picture = pixels(tmp_path / "grid.png")
    for row in range(2):
        caption = picture[4 + row * 75 + 57 : (row + 1) * 75, 4:60]
        assert caption.min() < 100, "no letters below the image"
        assert caption[:, [0, -1]].min() > 200, "letters run into the next cell"


@pytest.mark.parametrize(
    ("scores", "captions"),
    [
        ([3.0, 0.123, -12.3], ["3.0", "0.1", "−12.3"]),
        ([50.0025, 50.0017, 49.9994], ["50.0025", "50.0017", "49.9994"]),
        ([123456.7, 3.0], ["123457", "3"]),
        ([2.5, 2.5], ["2.50", "2.50"]),
        ([1.0, math.nan], ["1.00", "nan"]),
    ],
)
def test_captions_have_the_digits_that_tell_scores_apart(scores, captions):
    assert plots._captions(np.array(scores)) == captions


def test_narrow_images_leave_room_for_their_captions(tmp_path):
    plots.save_grid(torch.zeros(2, 1, 64, 4), tmp_path / "grid.png", columns=2, scores=[-123.4, 100.2])
    assert pixels(tmp_path / "grid.png").shape[1] > 2 * 25


@pytest.fixture
def drawn(monkeypatch):
    """The figures that were saved."""
    figures = []
    save = Figure.savefig

    def remember(figure, *arguments, **options):
        figures.append(figure)
        save(figure, *arguments, **options)

    monkeypatch.setattr(Figure, "savefig", remember)
    return figures


def test_points_make_a_scatter_plot_coloured_by_score(tmp_path, drawn):
    points, scores = torch.randn(33, 2), torch.arange(33.0)
    plots.save_grid(points, tmp_path / "plain.png", columns=4)
    plots.save_grid(points, tmp_path / "scored.png", columns=4, scores=scores)
    plain, scored = (figure.axes[0].collections[0] for figure in drawn)
    np.testing.assert_array_equal(plain.get_offsets(), points.numpy())
    np.testing.assert_array_equal(scored.get_offsets(), points.flip(0).numpy())
    np.testing.assert_array_equal(scored.get_array(), scores.flip(0).numpy())
    assert drawn[1].axes[1].get_ylabel() == "critic score"


@pytest.mark.parametrize("shape", [(3,), (5, 7), (2, 3, 2, 5, 1), (1,)])
def test_other_samples_make_the_rows_of_a_heat_map(tmp_path, drawn, shape):
    samples, scores = torch.randn(63, *shape), torch.arange(63.0)
    plots.save_grid(samples, tmp_path / "map.png", columns=4, scores=scores)
    axes = drawn[0].axes[0]
    np.testing.assert_array_equal(axes.images[0].get_array(), samples.flip(0).reshape(63, -1).numpy())
    labels = {round(row): label.get_text() for row, label in zip(axes.get_yticks(), axes.get_yticklabels())}
    assert (labels[0], labels[62]) == ("62.0", "0.0")


def test_waveforms_are_drawn_row_by_row_at_one_scale(tmp_path, drawn):
    waves = torch.stack([torch.full((2, 50), float(k)) for k in range(6)])  # levels
    waves[1, 0, 7] = math.inf
    plots.save_grid(waves, tmp_path / "waves.png", columns=3, scores=torch.arange(6.0))
    axes = drawn[0].axes[0]
    first, second = (collection.get_segments() for collection in axes.collections)
    assert len(first) == len(second) == 6  # channels
    # The highest score comes first; levels 5, 4, 3 in the upper row, 2, 1, 0 in the lower.
    across = [(line[:, 0].min() > index % 3, line[:, 0].max() < index % 3 + 1) for index, line in enumerate(second)]
    assert across == [(True, True)] * 6
    levels = [line[0, 1] + index // 3 for index, line in enumerate(second)]
    np.testing.assert_allclose(np.diff(levels), -0.8 / 5, atol=1e-6)
    assert [len(line) for line in first] == [50, 50, 50, 50, 49, 50]  # infinity leaves a gap
    assert [text.get_text() for text in axes.texts] == ["5.00", "4.00", "3.00", "2.00", "1.00", "0.00"]
    assert axes.get_title(loc="left") == "6 generated samples of length 50; values 0 to 5"


def test_volumes_show_three_slices_each_of_every_channel(tmp_path):
    volume = torch.full((1, 2, 9, 64, 64), -1.0)
    volume[0, 0, 4] = 1.0  # the middle slice of the first channel
    plots.save_grid(volume, tmp_path / "volumes.png", columns=1)
    picture = pixels(tmp_path / "volumes.png")[4:-4, 4:-4, 0]
    assert picture.shape == (128, 3 * 64 + 2)
    middles = [[int(picture[row, 32 + 65 * column]) for column in range(3)] for row in (32, 96)]
    assert middles == [[0, 255, 0], [0, 0, 0]]
    assert picture[32, 64] == picture[96, 129] == 192  # between slices


def test_volumes_of_any_scale_are_brought_into_the_greys(tmp_path):
    volume = torch.linspace(0, 1000, 3).reshape(3, 1, 1, 1, 1).expand(3, 1, 1, 192, 192)
    plots.save_grid(volume, tmp_path / "volumes.png", columns=1)
    assert [int(pixels(tmp_path / "volumes.png")[4 + 96 + 196 * k, 100, 0]) for k in range(3)] == [0, 128, 255]


def test_single_numbers_make_a_histogram(tmp_path, drawn):
    plots.save_grid(torch.arange(100.0)[:, None], tmp_path / "numbers.png", columns=4)
    bars = drawn[0].axes[0].patches
    assert sum(bar.get_height() for bar in bars) == 100


def test_samples_that_cannot_be_drawn_are_counted(tmp_path, drawn):
    points = torch.zeros(5, 2)
    points[1, 0], points[3, 1] = math.nan, math.inf
    plots.save_grid(points, tmp_path / "points.png", columns=4)
    plots.save_grid(points[:1], tmp_path / "point.png", columns=4)
    titles = [figure.axes[0].get_title(loc="left") for figure in drawn]
    assert titles == ["5 generated samples, 2 with values that are not finite", "1 generated sample"]


@pytest.mark.parametrize(
    ("samples", "options", "message"),
    [
        (torch.zeros(0, 1, 8, 8), {}, r"at least one value, got \[0, 1, 8, 8\]"),
        (torch.zeros(5), {}, r"shape \[N, \*D\] .* got \[5\]"),
        (torch.zeros(2, 1, 8, 8), {"columns": 0}, "columns must be at least 1, got 0"),
        (torch.zeros(2, 1, 8, 8), {"scores": [1.0]}, r"one per sample, \[2\], got \[1\]"),
        (torch.zeros(2, 1, 8, 8), {"scores": torch.zeros(2, 1)}, r"one per sample, \[2\], got \[2, 1\]"),
    ],
)
def test_grid_refuses_what_it_cannot_draw(tmp_path, samples, options, message):
    with pytest.raises(InputError, match=message):
        plots.save_grid(samples, tmp_path / "grid.png", **({"columns": 2} | options))
    assert list(tmp_path.iterdir()) == []


def test_scatter_shows_both_sets_and_the_modes_in_the_frame_of_the_real_points(tmp_path, drawn):
    real = torch.tensor([[0.0, 0.0], [4.0, 2.0], [1.0, 1.0]])
    fake = torch.tensor([[2.0, 1.0], [900.0, 0.0], [math.nan, 0.0]])
    modes = torch.tensor([[2.0, 2.0]])
    plots.save_scatter(fake, real, tmp_path / "scatter.png", modes=modes)
    axes = drawn[0].axes[0]
    shown = {collection.get_label(): collection.get_offsets() for collection in axes.collections}
    assert set(shown) == {"real", "generated", "mode"}
    np.testing.assert_array_equal(shown["real"], real)
    np.testing.assert_array_equal(shown["mode"], modes)
    assert axes.get_xlim() == pytest.approx((2 - 2.6, 2 + 2.6))  # a square around the real points
    assert axes.get_ylim() == pytest.approx((1 - 2.6, 1 + 2.6))
    assert axes.get_title(loc="left") == "3 generated samples, 2 of them outside the frame"


def test_scatter_of_a_single_real_point(tmp_path):
    plots.save_scatter([[0.0, 0.0]], [[1.0, 1.0]], tmp_path / "scatter.png")
    assert pixels(tmp_path / "scatter.png").std() > 1


@pytest.mark.parametrize(("fake", "name"), [(torch.zeros(3, 3), "fake"), (torch.zeros(0, 2), "fake")])
def test_scatter_refuses_sets_that_are_not_points(tmp_path, fake, name):
    with pytest.raises(InputError, match=f"{name} must be points of the plane"):
        plots.save_scatter(fake, torch.zeros(2, 2), tmp_path / "scatter.png")


def run_records(n):
    rng = np.random.default_rng(0)
    for step in range(0, 10 * n, 10):
        record = {
            key: rng.normal()
            for panel in plots._PANELS
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
    plots.save_curves(records, tmp_path / "curves.png", title="a run", target=1.0)
    (figure,) = drawn
    assert panel_titles(figure) == [panel.title for panel in plots._PANELS]
    assert figure.get_suptitle() == "a run"
    for axes, panel in zip(figure.axes, plots._PANELS):
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
    plots.save_curves([{"step": int(s), "penalty": v} for s, v in zip(steps, values)], tmp_path / "curves.png")
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
    plots.save_curves(records, tmp_path / "curves.png")
    assert panel_titles(drawn[0]) == ["Losses"]
    np.testing.assert_array_equal(drawn[0].axes[0].lines[0].get_xydata(), [[1, 2.0], [3, 1.0]])


def test_a_spike_of_the_first_steps_does_not_flatten_the_curve(tmp_path, drawn):
    values = [1e6, 1e5, 1e4] + [math.sin(step / 50) for step in range(997)]
    plots.save_curves([{"step": s, "critic_loss": v} for s, v in enumerate(values)], tmp_path / "curves.png")
    low, high = drawn[0].axes[0].get_ylim()
    assert -2 < low < -1
    assert 1 < high < 2


def test_early_points_beyond_the_frame_are_marked_with_their_extreme(tmp_path, drawn):
    """Also where there are few values: two of sixty."""
    values = [1000.0, 900.0] + [math.sin(step) for step in range(58)]
    records = [{"step": s, "critic_loss": v, "generator_loss": -20 * v} for s, v in enumerate(values)]
    plots.save_curves(records, tmp_path / "curves.png")
    axes = drawn[0].axes[0]
    assert max(abs(limit) for limit in axes.get_ylim()) < 60
    assert {text.get_text(): text.xy[0] for text in axes.texts} == {"1,000": 0, "−20,000": 0}
    edges = {line.get_marker(): line.get_ydata()[0] for line in axes.lines if line.get_marker() in "^v"}
    assert (edges["v"], edges["^"]) == axes.get_ylim()


def test_nothing_is_marked_where_everything_is_in_the_frame(tmp_path, drawn):
    plots.save_curves([{"step": s, "critic_loss": math.sin(s)} for s in range(60)], tmp_path / "curves.png")
    assert list(drawn[0].axes[0].texts) == []


def test_a_learning_rate_that_stays_the_same_is_said_in_the_title(tmp_path, drawn):
    records = [{"step": s, "critic_loss": 1.0, "learning_rate": 0.5} for s in (1, 2)]
    plots.save_curves(records, tmp_path / "curves.png", title="a run")
    plots.save_curves([*records, {"step": 3, "learning_rate": 0.25}], tmp_path / "curves.png", title="a run")
    assert [panel_titles(figure) for figure in drawn] == [["Losses"], ["Losses", "Learning rate"]]
    assert [figure.get_suptitle() for figure in drawn] == ["a run, learning rate 0.5", "a run"]


def test_a_long_title_fits_the_figure(tmp_path, drawn):
    plots.save_curves([{"step": 1, "critic_loss": 1.0}], tmp_path / "curves.png", title="wgan-gp on " + "long/" * 90)
    (figure,) = drawn
    assert figure._suptitle.get_window_extent().x1 < figure.bbox.x1
    assert figure.get_suptitle().startswith("wgan-gp on long")


def test_no_legend_lies_over_a_line(tmp_path, drawn):
    records = [{"step": s, "wasserstein": s, "held_out_wasserstein": s, "frechet_distance": s} for s in range(1, 9)]
    plots.save_curves(records, tmp_path / "curves.png")
    axes = drawn[0].axes[0]
    assert axes.get_legend().get_window_extent().y0 >= axes.bbox.y1


def test_an_outlying_curve_with_few_points_stays_in_the_frame(tmp_path, drawn):
    records = [{"step": s, "wasserstein": 1.0} for s in range(1000)]
    records += [{"step": s, "held_out_wasserstein": 50.0} for s in (0, 999)]
    plots.save_curves(records, tmp_path / "curves.png")
    assert drawn[0].axes[0].get_ylim()[1] > 50


@pytest.mark.parametrize("n", [1, 2])
def test_curves_of_very_short_runs_can_be_drawn(tmp_path, recwarn, n):
    plots.save_curves(run_records(n), tmp_path / "curves.png", target=0.0)
    assert pixels(tmp_path / "curves.png").std() > 1
    assert [str(warning.message) for warning in recwarn] == []


@pytest.mark.parametrize("records", [[], [{"step": 1}], [{"critic_loss": 1.0}], [{"step": 1, "penalty": None}]])
def test_curves_without_figures_are_refused(tmp_path, records):
    with pytest.raises(InputError, match="at least one step with a finite value"):
        plots.save_curves(records, tmp_path / "curves.png")


def test_a_failed_write_leaves_the_old_picture_and_no_rubbish(tmp_path, monkeypatch):
    path = tmp_path / "grid.png"
    plots.save_grid(torch.zeros(1, 1, 8, 8), path, columns=1)
    before = path.read_bytes()

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(plots.os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        plots.save_grid(torch.ones(1, 1, 8, 8), path, columns=1)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["grid.png"]


def test_global_state_of_matplotlib_is_left_alone(tmp_path):
    # Without "backend": reading it makes Matplotlib choose one, which is what must not happen.
    code = (
        "import sys, matplotlib\n"
        "settings = lambda: {k: matplotlib.rcParams[k] for k in matplotlib.rcParams if k != 'backend'}\n"
        "before = settings()\n"
        "from wgan_fast.training import plots\n"
        f"plots.save_curves([{{'step': 1, 'penalty': 1.0}}], {str(tmp_path / 'c.png')!r})\n"
        "assert settings() == before\n"
        "assert 'matplotlib.pyplot' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_missing_libraries_are_said_with_the_extra_that_brings_them():
    code = (
        "import sys\n"
        "sys.modules['matplotlib'] = None\n"
        "try:\n"
        "    import wgan_fast.training.plots\n"
        "except ImportError as error:\n"
        "    assert \"pip install 'wgan_fast[train]'\" in str(error), error\n"
        "else:\n"
        "    raise SystemExit('imported')\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# Tracked quality


def test_rank_correlation_is_that_of_scipy():
    stats = pytest.importorskip("scipy.stats")
    rng = np.random.default_rng(0)
    for a, b in ((rng.normal(size=33), rng.normal(size=33)), rng.integers(4, size=(2, 63)).astype(float)):
        assert plots._rank_correlation(a, b) == pytest.approx(stats.spearmanr(a, b).statistic, rel=1e-12)
    assert plots._rank_correlation(np.arange(2.0), np.arange(2.0)) is None
    assert plots._rank_correlation(np.arange(5.0), np.zeros(5)) is None


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
    plots.save_curves(tracked(key, rising=rising), tmp_path / "curves.png")
    axes = [axes for axes in drawn[0].axes if axes.get_ylabel() == label]
    np.testing.assert_array_equal(axes[0].lines[0].get_xdata(), np.arange(10, 101, 10))
    expected = np.arange(10, 101, 10) if rising else 1000 / np.arange(10, 101, 10)
    np.testing.assert_allclose(axes[0].lines[0].get_ydata(), expected)
    title = f"Wasserstein estimate; Spearman's ρ with the {label}: {'-1.00' if rising else '1.00'} (10 points)"
    assert drawn[0].axes[0].get_title(loc="left") == title


def test_title_is_plain_where_quality_was_not_tracked(tmp_path, drawn):
    plots.save_curves([{"step": step, "wasserstein": 1.0 / step} for step in range(1, 9)], tmp_path / "curves.png")
    assert drawn[0].axes[0].get_title(loc="left") == "Wasserstein estimate"


def test_distance_of_zero_and_missing_values_are_drawn(tmp_path, drawn):
    records = tracked("frechet_distance")
    records[9]["frechet_distance"], records[19]["frechet_distance"] = 0.0, None
    plots.save_curves(records, tmp_path / "curves.png")
    assert "(9 points)" in drawn[0].axes[0].get_title(loc="left")
