"""How long training waits for images that are decoded while it runs.

The device is played by a pause, in which the host has nothing to do, as with a GPU that is kept busy: what is measured
is whether the next iteration's batches are there when it ends. `make bench` prints the share of time spent waiting.
"""

import itertools
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import wgan_fast.training.data
from wgan_fast.training.data import batches, load_data

N_CRITIC, BATCH_SIZE, ITERATIONS = 5, 64, 12
BUSY = 0.4
"""Seconds of device time per iteration; one core decodes the 320 images of an iteration in less."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path, draw = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for index in range(400):
        coarse = Image.fromarray(draw.integers(0, 256, (8, 8, 3), dtype=np.uint8))
        coarse.resize((178, 218)).save(path / f"{index}.jpg", quality=90)  # the size of CelebA's
    return path


def waiting(folder: Path, workers: int, ahead: int) -> float:
    """Share of the time between iterations and the time that the device is busy."""
    split = load_data(folder, image_size=64, holdout=0.0).train
    reals = batches(split, BATCH_SIZE, seed=0, workers=workers, ahead=ahead)
    waited = 0.0
    for iteration in range(ITERATIONS + 1):
        begun = time.perf_counter()
        taken = sum(1 for _ in itertools.islice(reals, N_CRITIC))
        assert taken == N_CRITIC
        waited += (time.perf_counter() - begun) * (iteration > 0)  # the first starts the processes
        time.sleep(BUSY)
    return waited / (waited + ITERATIONS * BUSY)


def test_waiting_for_data(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(wgan_fast.training.data.splits, "RESIDENT_BYTES", 0)
    ahead = 2 * N_CRITIC
    measured = {workers: waiting(folder, workers, ahead) for workers in (0, 1, 2)}
    short = waiting(folder, 1, 2)
    with capsys.disabled():
        print(f"\nwaiting for images, {N_CRITIC * BATCH_SIZE} decoded and resized to 64x64 per {BUSY} s of device time")
        for workers, share in measured.items():
            print(f"  workers {workers}: {share:6.1%}")
        print(f"  workers 1, two batches ahead: {short:6.1%}")
    assert measured[1] < 0.5 * measured[0]
