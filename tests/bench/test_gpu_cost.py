"""The model of what steps cost on a GPU: what it counts, what it makes of that, and the page that it writes."""

import functools
import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT / "benchmarks" / "gpu"), str(ROOT / "benchmarks")]

import cost
import torch
from cost import Machine, Work

from wgan_fast.bench import variants, workloads
from wgan_fast.bench.as_on_gpu import as_on_gpu

UNIT = Machine("unit", 1e9, {"bf16": 1e12}, least_s=1e-6, least_product_s=5e-6, convolved=0.5)


@pytest.mark.parametrize(
    ("work", "seconds"),
    [
        (Work("add", 0, 0), 1e-6),
        (Work("add", 0, 1e6), 1e-3),
        (Work("mm", 1, 1), 5e-6),
        (Work("mm", 1e9, 1e3), 1e-3),
        (Work("convolution_backward", 1e9, 1e3), 2e-3),
        (Work("mm", 1e9, 3e6), 3e-3),
    ],
)
def test_an_operator_is_bound_by_one_thing(work, seconds):
    assert UNIT.seconds([work, work], "bf16") == pytest.approx(2 * seconds)


@pytest.mark.parametrize(("model", "precision"), [("amp", "bf16"), ("dcgan-28", "bf16"), ("toy-mlp", "fp32")])
def test_what_a_batch_asks_for_follows_from_two_smaller_ones(model, precision):
    """And is as many operators as are committed for a GPU."""
    batch = workloads.build(model, batch_size=12)
    images = batch.real.dim() == 4
    with as_on_gpu():
        step = variants.ours(batch.channels_last() if images else batch, precision=precision)
        counted = cost.recorded(functools.partial(step, None))
    assert cost.step(model, 12, precision) == counted
    committed = json.loads((ROOT / "tests" / "four_pass" / "gpu_counts.json").read_text())
    form = f"{model}/{precision}" + (", channels last" if images else "")
    assert len(counted) == committed[form]["operators"]


def test_batches_that_are_planned_in_two_ways_are_refused():
    with pytest.raises(ValueError, match="two ways"):
        cost.at_size(8, (1, 2), lambda size: [Work("mm" if size > 1 else "mv", 1, 1)])


def test_what_is_only_written_to_is_counted_once():
    x, out = torch.randn(3, 4), torch.empty(3, 4)
    work = cost.recorded(lambda: (torch.mul(x, 2, out=out), out.copy_(x), out.add_(x)))
    assert [(w.name, w.nbytes) for w in work] == [("mul", 96), ("copy_", 96), ("add_", 144)]


def test_a_row_has_the_least_that_was_measured_on_that_machine_if_anywhere():
    def file(device, **times):
        item = {"milliseconds": {"ours": [0.001], **{name: [time] for name, time in times.items()}}}
        return {"environment": {"device": device}, "items": {"target/amp/128/tf32": item}}

    files = [file("NVIDIA H200", **{"ours, graph": 0.01}), file("NVIDIA H100 80GB", **{"ours, graph": 0.2})]
    files += [file("NVIDIA H100", **{"ours, graph": 0.3, "ours, compiled, graph": 0.01})]
    _, row = cost.rows(files, measured_alone=True)
    assert row[0] == "amp, 128, tf32"
    assert row[5:7] == ["0.2 ms", "H100"]
    assert float(row[7]) == pytest.approx(0.2 / float(row[4].split()[0]), rel=0.05)


def test_the_rows_of_one_model_on_the_page_are_what_is_counted_now():
    """Of the smallest: all of them take a minute; `make report` writes them."""
    text = (ROOT / "docs" / "gpu_cost.md").read_text()
    files = [json.loads(path.read_text()) for path in sorted((ROOT / "benchmarks/results/gpu").glob("*.json"))]
    files = [found | {"items": {k: v for k, v in found["items"].items() if "/amp/" in k}} for found in files]
    for row in cost.rows(files, measured_alone=True)[1:]:
        line = next(line for line in text.splitlines() if line.startswith(f"| {row[0]} "))
        assert [cell.strip() for cell in line.strip("|").split("|")] == row
