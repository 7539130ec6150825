"""Generated images are rated by a classifier of the same data, beside what real ones get."""

import gzip
import os
import stat
import struct
import sys

import numpy as np
import pytest
import torch

from wgan_fast.errors import InputError
from wgan_fast.training import metrics, quality
from wgan_fast.training.data import load_data, load_labels

pytest.importorskip("sklearn")
pytest.importorskip("safetensors")


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    """A cache folder of these tests' own."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder))
        yield folder / "wgan_fast"


@pytest.fixture(scope="module")
def data():
    return load_data("digits", seed=3)


@pytest.fixture(scope="module")
def labels():
    return load_labels("digits", seed=3)


@pytest.fixture(scope="module")
def judge(data, labels):
    return quality.Judge.load(data, labels)


# Labels


@pytest.mark.parametrize(("holdout", "seed"), [(0.1, 0), (0.3, 5)])
def test_labels_are_those_of_the_samples(holdout, seed):
    digits = pytest.importorskip("sklearn.datasets").load_digits()
    truth = {image.astype(np.float32).tobytes(): label for image, label in zip(digits.images, digits.target)}
    data = load_data("digits", holdout=holdout, seed=seed)
    labels = load_labels("digits", holdout=holdout, seed=seed)
    for samples, classes in ((data.train, labels.train), (data.held_out, labels.held_out)):
        assert len(samples) == len(classes)
        images = ((samples.take(100, seed=2)[:, 0] + 1) * 8).round().numpy()
        assert [truth[image.tobytes()] for image in images] == classes.take(100, seed=2).tolist()


def write_idx(path, array):
    body = bytes((0, 0, 8, array.ndim)) + struct.pack(f">{array.ndim}i", *array.shape) + array.tobytes()
    path.write_bytes(gzip.compress(body) if path.suffix == ".gz" else body)


@pytest.mark.parametrize(
    ("end", "names"),
    [("", ["train-{}-idx{}-ubyte", "t10k-{}-idx{}-ubyte"]), (".gz", ["train-{}.idx{}-ubyte"])],
)
def test_labels_of_idx_files_are_those_of_the_samples(tmp_path, end, names):
    rng = np.random.default_rng(0)
    for name in names:
        classes = rng.integers(10, size=40).astype(np.uint8)
        images = np.broadcast_to(20 * classes[:, None, None], (40, 5, 5)).copy()  # the grey tells the class
        write_idx(tmp_path / (name.format("images", 3) + end), images)
        write_idx(tmp_path / (name.format("labels", 1) + end), classes)
    sources = [tmp_path, tmp_path / (names[0].format("images", 3) + end)]
    for source in sources:
        data, labels = load_data(source, seed=1), load_labels(str(source), seed=1)
        for samples, their in ((data.train, labels.train), (data.held_out, labels.held_out)):
            greys = (samples.take(len(samples))[:, 0, 0, 0] + 1) * 127.5 / 20
            assert greys.round().tolist() == their.take(len(their)).tolist()


def test_data_without_classes_has_no_labels(tmp_path):
    np.save(tmp_path / "x.npy", np.zeros((9, 4), np.float32))
    for source in ("8gaussians", str(tmp_path / "x.npy"), str(tmp_path), "nowhere"):
        assert load_labels(source) is None


@pytest.mark.parametrize("body", [b"", bytes((0, 0, 8, 1, 0, 0, 0, 3, 1, 2)), bytes((0, 0, 8, 3, 0, 0, 0, 0))])
def test_damaged_labels_are_refused(tmp_path, body):
    write_idx(tmp_path / "train-images-idx3-ubyte", np.zeros((3, 4, 4), np.uint8))
    (tmp_path / "train-labels-idx1-ubyte").write_bytes(body)
    with pytest.raises(InputError, match=r"train-labels-idx1-ubyte (is not an IDX file|holds 2 bytes)"):
        load_labels(str(tmp_path / "train-images-idx3-ubyte"))


def test_labels_of_other_data_are_refused(data):
    with pytest.raises(InputError, match="1258 labels for 1617 samples of digits"):
        quality.Judge.load(data, load_labels("digits", holdout=0.3))


def test_too_few_samples_have_no_judge(data, labels, tmp_path):
    assert quality.Judge.load(data, labels, samples=1) is None
    write_idx(tmp_path / "train-images-idx3-ubyte", np.arange(10 * 16, dtype=np.uint8).reshape(10, 4, 4))
    write_idx(tmp_path / "train-labels-idx1-ubyte", np.arange(10, dtype=np.uint8))
    few, their = load_data(tmp_path), load_labels(str(tmp_path))
    assert quality.Judge.load(few, their) is None
    assert quality.tracker(few, their).rate(few.train.take(5)).keys() == {"sliced_wasserstein"}


# The classifier and its cache


def test_classifier_knows_the_digits_that_it_did_not_see(judge):
    assert judge.accuracy > 0.95


def test_classifier_sees_none_of_the_samples_that_it_compares(data, labels, monkeypatch):
    seen = []
    load = quality.load_classifier
    monkeypatch.setattr(quality, "load_classifier", lambda *all: seen.append(all[0]) or load(*all))
    judge = quality.Judge.load(data, labels)
    trained_on = {image.numpy().tobytes() for image in seen[0]}
    compared = [image.numpy().tobytes() for image in torch.cat((judge.held_out, judge.reference))]
    assert len(trained_on) == 1617 - 180
    # Pictures that occur twice in the data set do not count.
    assert len(trained_on.intersection(compared)) <= 1
    assert len(set(compared)) >= 359


def test_classifier_is_trained_once_and_read_back_bit_for_bit(data, labels, judge, cache, monkeypatch):
    monkeypatch.setattr(quality, "train_classifier", None)
    again = quality.Judge.load(data, labels, seed=9)
    for name, tensor in judge.classifier.state_dict().items():
        assert torch.equal(tensor, again.classifier.state_dict()[name])
    assert [path.suffix for path in cache.iterdir()] == [".safetensors"]


TINY = torch.linspace(-1, 1, 30).reshape(30, 1, 1, 1).expand(30, 1, 4, 4).contiguous(), torch.arange(30) // 15


@pytest.fixture
def quick(monkeypatch, tmp_path):
    """A classifier of few steps, and how often one was trained; the cache is empty."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(quality, "_STEPS", 20)
    trained = []
    train = quality.train_classifier
    monkeypatch.setattr(quality, "train_classifier", lambda *all: trained.append(1) or train(*all))
    return trained


def damaged(body):
    return [b"", body[:-7], body[:-3] + bytes(byte ^ 1 for byte in body[-3:]), b"x" + body[1:]]


def test_damaged_cache_is_replaced(quick, tmp_path):
    first = quality.load_classifier(*TINY, 2)(TINY[0])
    (path,) = (tmp_path / "wgan_fast").iterdir()
    body = path.read_bytes()
    for count, wrong in enumerate(damaged(body), 2):
        path.write_bytes(wrong)
        assert torch.equal(quality.load_classifier(*TINY, 2)(TINY[0]), first)
        assert len(quick) == count
        assert path.read_bytes() == body
    quality.load_classifier(*TINY, 2)
    assert len(quick) == count


def test_other_data_has_another_classifier(quick, tmp_path):
    images, labels = TINY
    quality.load_classifier(images, labels, 2)
    changed = images.clone()
    changed[7, 0, 0, 0] += 1e-3
    for other in (
        (changed, labels, 2),
        (images, 1 - labels, 2),
        (images, labels, 3),
        (images.view(30, 1, 2, 8), labels, 2),
    ):
        quality.load_classifier(*other)
    assert len(quick) == len(list((tmp_path / "wgan_fast").iterdir())) == 5


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_cache_that_cannot_be_written_is_done_without(quick, tmp_path):
    tmp_path.chmod(stat.S_IRUSR | stat.S_IXUSR)
    quality.load_classifier(*TINY, 2)
    assert list(tmp_path.iterdir()) == []


def test_cache_below_a_file_is_done_without(quick, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    quality.load_classifier(*TINY, 2)
    assert quick == [1]


def test_training_the_classifier_leaves_the_random_numbers_alone(quick):
    before = torch.get_rng_state()
    with torch.no_grad():  # also where the caller wants no gradients
        quality.load_classifier(*TINY, 2)
    assert torch.equal(torch.get_rng_state(), before)


# Ratings


def test_rating_is_made_of_the_measures_beside_those_of_real_samples(judge):
    torch.manual_seed(0)
    fake = 0.8 * judge.held_out.roll(1, 0) + 0.3 * torch.randn_like(judge.held_out)
    rating = judge.rate(fake)
    with torch.no_grad():
        features = {name: judge.classifier.features(x) for name, x in
                    (("fake", fake), ("real", judge.reference), ("held_out", judge.held_out))}  # fmt: skip
        classes = judge.classifier(fake).argmax(1)
    for name, end in (("fake", ""), ("real", "_floor")):
        expected = metrics.frechet_distance(features[name], features["held_out"])
        assert rating[f"frechet_distance{end}"] == pytest.approx(expected, rel=1e-5)
    for name, end in (("fake", ""), ("real", "_real")):
        expected = metrics.manifold(features["held_out"], features[name])
        found = [rating[f"{key}{end}"] for key in expected._fields]
        assert found == pytest.approx(expected, abs=2 / 180)  # a tie that float32 breaks otherwise
    shares = torch.bincount(classes, minlength=10) / 180
    assert rating["class_entropy"] == pytest.approx(torch.special.entr(shares.double()).sum().item(), abs=1e-6)
    assert (rating["compared_samples"], rating["classes"], rating["classifier_accuracy"]) == (180, 10, judge.accuracy)


def test_real_samples_are_rated_like_real_samples(judge, data):
    rating = judge.rate(data.train.take(180, seed=8))
    # The floor varies by a factor of about three between draws of 180 samples; noise is beyond ten.
    assert rating["frechet_distance"] < 3 * rating["frechet_distance_floor"]
    assert judge.rate(torch.randn(180, 1, 8, 8).clamp(-1, 1))["frechet_distance"] > 6 * rating["frechet_distance_floor"]
    for name in ("precision", "recall", "density", "coverage"):
        assert rating[name] > rating[f"{name}_real"] - 0.15
    assert rating["classes_covered"] == rating["classes_covered_real"] == 10
    assert rating["class_entropy_real"] == pytest.approx(np.log(10), abs=0.05)


def test_classes_that_are_missing_are_missed(judge, data, labels):
    images, classes = data.train.take(1000), labels.train.take(1000)
    rating = judge.rate(images[classes < 4][:180])
    # The classifier errs on a few: their classes stay below a tenth of what they should be.
    assert rating["classes_covered"] == 4
    assert rating["class_entropy"] == pytest.approx(np.log(4), abs=0.12)
    assert rating["coverage"] < 0.6
    assert rating["precision"] > 0.7


def test_few_samples_are_compared_with_as_few(judge):
    rating = judge.rate(judge.held_out[:3])
    assert rating["compared_samples"] == 3
    assert rating["frechet_distance"] == pytest.approx(0, abs=1e-9)
    assert rating["frechet_distance_floor"] > 0


# Tracking


def test_tracker_of_images_with_classes_rates_them(data, labels, judge):
    tracker = quality.tracker(data, labels)
    fake = judge.held_out.flip(-1)
    expected = judge.rate(fake)
    assert tracker.samples == len(fake) == 180
    assert tracker.rate(fake) == {name: expected[name] for name in ("frechet_distance", "coverage", "classes_covered")}


def test_tracker_of_a_toy_mixture_counts_modes_and_measures_the_distance():
    data = load_data("8gaussians")
    figures = quality.tracker(data, None).rate(data.train.take(500))
    assert figures["modes_covered"] == 8
    assert figures["high_quality"] > 0.95
    held_out = data.held_out.take(2000)
    assert figures["sliced_wasserstein"] == metrics.sliced_wasserstein(data.train.take(500), held_out)


def test_tracker_without_held_out_data_is_refused():
    with pytest.raises(InputError, match="track needs held-out samples"):
        quality.tracker(load_data(torch.randn(20, 3), holdout=0), None)


def test_missing_safetensors_is_said_with_the_extra_that_brings_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    with pytest.raises(ImportError, match=r"needs safetensors: pip install 'wgan_fast\[train\]'"):
        quality.load_classifier(*TINY, 2)
