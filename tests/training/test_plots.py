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
        "from wgan_fast.training import curves\n"
        f"curves.save_curves([{{'step': 1, 'penalty': 1.0}}], {str(tmp_path / 'c.png')!r})\n"
        "assert settings() == before\n"
        "assert 'matplotlib.pyplot' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("module", ["plots", "curves", "figures"])
def test_missing_libraries_are_said_with_the_extra_that_brings_them(module):
    code = (
        "import sys\n"
        "sys.modules['matplotlib'] = None\n"
        "try:\n"
        f"    import wgan_fast.training.{module}\n"
        "except ImportError as error:\n"
        "    assert \"pip install 'wgan_fast[train]'\" in str(error), error\n"
        "else:\n"
        "    raise SystemExit('imported')\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
