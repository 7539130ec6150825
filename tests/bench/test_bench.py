"""The benchmark times only what is right, counts what it says, and tells what it found."""

import contextlib
import json
import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from wgan_fast import CriticStep
from wgan_fast.bench import report, results, scaling, series, workloads
from wgan_fast.bench.check import Checker, PatientChecker, WrongGradientsError
from wgan_fast.bench.limit import limit
from wgan_fast.bench.measure import count, forward_flops, interleaved, peak_bytes
from wgan_fast.bench.run import run
from wgan_fast.bench.step import Skipped, Step
from wgan_fast.bench.variants import VARIANTS, Variant, naive, ours
from wgan_fast.errors import InputError
from wgan_fast.training.cli import main

CHECKOUT = Path(__file__).parents[2]
EAGER = [name for name, variant in VARIANTS.items() if not variant.compiled and variant.computes != "nothing"]


def packed_conv_critic() -> nn.Module:
    """Small and with everything that the variants handle apart: images, dropout, normalisation."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 6, 3, stride=2, padding=1),
        nn.LeakyReLU(0.2),
        nn.Dropout(0.5),
        nn.Conv2d(6, 4, 3, padding=1),
        nn.GroupNorm(1, 4),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(4 * 3 * 3, 1),
    )


def small(penalty: str = "wgan-gp", batch_size: int = 7) -> workloads.Workload:
    name = f"{__name__}:packed_conv_critic"
    return workloads.build(name, penalty=penalty, sample_shape=(2, 5, 5), batch_size=batch_size)


def called(critic: nn.Module, *shape: int) -> nn.Module:
    """The critic after a forward, of which its hooks keep weights with a graph behind them."""
    critic(torch.randn(2, *shape))
    return critic


def weight_norm_critic() -> nn.Module:
    torch.manual_seed(0)
    norm = nn.utils.weight_norm
    return nn.Sequential(norm(nn.Linear(3, 7)), nn.Softplus(), norm(nn.Linear(7, 1, bias=False)))


def called_weight_norm_critic() -> nn.Module:
    return called(weight_norm_critic(), 3)


def spectral_norm_critic(norm: Callable[[nn.Module], nn.Module] = nn.utils.spectral_norm) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(norm(nn.Linear(3, 7)), nn.Softplus(), norm(nn.Linear(7, 1, bias=False)))


def called_spectral_norm_critic() -> nn.Module:
    return called(spectral_norm_critic(), 3)


def parametrised_critic() -> nn.Module:
    return spectral_norm_critic(nn.utils.parametrizations.spectral_norm)


class VolumeCritic(nn.Module):
    """Takes images apart into the slices of a volume."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.volumes, self.images = nn.Conv3d(1, 4, 2), nn.Conv2d(4, 1, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.images(nn.functional.softplus(self.volumes(x[:, None]).squeeze(2))).mean(dim=(1, 2, 3))


def noisy_critic() -> nn.Module:
    """Trying it moves random numbers and running statistics."""
    return nn.Sequential(nn.Dropout(0.5), nn.BatchNorm1d(3), nn.Linear(3, 1))


def broken_critic() -> nn.Module:
    raise KeyError("no such\nwidth")


def two_scores() -> nn.Module:
    return nn.Linear(3, 2)


def packed(penalty: str = "wgan-gp") -> workloads.Workload:
    return workloads.build("tabular-mlp", penalty=penalty, batch_size=30)


# Right before it is timed


@pytest.mark.parametrize("penalty", workloads.PENALTIES)
@pytest.mark.parametrize("name", EAGER)
def test_every_eager_variant_computes_the_same_gradients(name, penalty):
    for workload in (small(penalty), packed(penalty)):
        variant = VARIANTS[name]
        if not variant.applies(workload):
            continue
        with contextlib.suppress(Skipped):
            Checker(workload).check(name, variant, variant.prepare(workload))


@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated")
@pytest.mark.parametrize(
    ("critic", "shape"),
    [
        ("weight_norm_critic", (3,)),
        ("called_weight_norm_critic", (3,)),
        ("spectral_norm_critic", (3,)),
        ("called_spectral_norm_critic", (3,)),
        ("parametrised_critic", (3,)),
        ("VolumeCritic", (2, 5, 5)),
    ],
)
def test_critics_with_weights_of_a_hook_or_over_volumes_are_measured(critic, shape):
    workload = workloads.build(f"{__name__}:{critic}", sample_shape=shape, batch_size=5)
    names = ["naive", "field", "naive-penalty", "naive-channels-last"]
    found = run(workload, names, budget=0)["variants"]
    if len(shape) < 3:
        assert "not images" in found.pop("naive-channels-last")["skipped"]
    assert "milliseconds" in found["naive"]
    assert not any("refused" in result for result in found.values()), found


def test_variants_are_skipped_where_they_do_not_apply_and_nowhere_else():
    def skipped(workload):
        def skips(variant):
            try:
                variant.prepare(workload)
            except Skipped:
                return True
            return False

        return {name for name in EAGER if VARIANTS[name].applies(workload) and skips(VARIANTS[name])}

    images_only = {"naive-channels-last", "ours-channels-last"}
    assert skipped(small()) == skipped(small("r1-r2")) == set()
    assert skipped(packed()) == skipped(packed("r1-r2")) == images_only
    assert skipped(small("none")) == {"field", "drop-in"}
    assert skipped(packed("none")) == {"field", "drop-in", "ours", "ours-bf16"} | images_only


@pytest.mark.slow
@pytest.mark.parametrize("penalty", workloads.PENALTIES)
@pytest.mark.parametrize("name", [name for name, variant in VARIANTS.items() if variant.compiled])
def test_every_compiled_variant_computes_the_same_gradients(name, penalty):
    if name == "jax":
        pytest.importorskip("jax")
    for workload in (small(penalty), packed(penalty)):
        torch.compiler.reset()  # as between workloads: one function is compiled a limited number of times
        with contextlib.suppress(Skipped):
            Checker(workload).check(name, VARIANTS[name], VARIANTS[name].prepare(workload))


def wrong_weight(workload):
    step = CriticStep(workload.critic, penalty=replace(workload.penalty, weight=9.9))
    return Step(lambda alpha: step(workload.real, workload.fake, alpha), workload.critic)


def no_double_backward(workload):
    """The commonest mistake: create_graph forgotten, so that the penalty's value is right and its gradient is 0."""
    return naive(workload, computes="loss")


def stale(workload):
    """Leaves the gradients of another α."""
    step = ours(workload)
    return Step(lambda alpha: step(1 - alpha), workload.critic)


def not_a_number(workload):
    def run(alpha):
        step(alpha)
        workload.critic[0].weight.grad[0] = torch.nan

    step = naive(workload)
    return Step(run, workload.critic)


@pytest.mark.parametrize("wrong", [wrong_weight, no_double_backward, stale, not_a_number])
def test_a_wrong_variant_is_refused_and_not_timed(wrong, monkeypatch):
    monkeypatch.setitem(VARIANTS, "ours", Variant("wrong", wrong))
    found = run(small(), ["naive", "ours"], budget=0)["variants"]
    assert "milliseconds" in found["naive"]
    assert "off by" in found["ours"]["refused"]
    assert "milliseconds" not in found["ours"]


class Kinked(nn.Module):
    """A ReLU of 0.1 + 0.3 - 0.4: 7e-9 in float64, and 0 in float32 where the first two are added first."""

    first_two_first = False

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.scale, self.last = nn.Parameter(torch.tensor(1.0)), nn.Linear(3, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        a, b, c = x.unbind(1)
        total = (a + b) + c if self.first_two_first else a + (b + c)
        return self.scale * torch.relu(total) + self.last(x**2).squeeze(1)


def kinked() -> workloads.Workload:
    workload = workloads.build(f"{__name__}:Kinked", sample_shape=(3,), batch_size=5, penalty="r1-r2")
    real = workload.real.clone()
    real[0] = torch.tensor([0.1, 0.3, -0.4])
    return replace(workload, real=real)


def beyond_the_kink(workload):
    critic = Kinked()
    critic.first_two_first = True
    return naive(replace(workload, critic=critic))


def test_the_other_side_of_a_kink_is_no_reason_to_refuse(monkeypatch):
    workload, variant = kinked(), Variant("beyond the kink", beyond_the_kink)
    with pytest.raises(WrongGradientsError, match="ours on"):
        Checker(workload).check("ours", variant, beyond_the_kink(workload))
    monkeypatch.setitem(VARIANTS, "ours", variant)
    monkeypatch.setattr("wgan_fast.bench.run.TOO_SLOW", float("inf"))  # one reading of so small a step is noise
    assert run(workload, ["ours"], budget=0)["variants"]["ours"]["error"] < 1e-6


def test_a_naive_step_beyond_a_kink_is_no_reason_to_judge_none(monkeypatch):
    workload = kinked()
    monkeypatch.setattr(Kinked, "first_two_first", True)
    with pytest.raises(WrongGradientsError, match="naive on"):
        Checker(workload).check("naive", VARIANTS["naive"], naive(workload))
    assert run(workload, [], budget=0)["variants"]["naive"]["error"] < 1e-6


@pytest.mark.parametrize("wrong", [wrong_weight, no_double_backward, stale, not_a_number])
def test_a_wrong_variant_is_tried_on_three_batches(wrong):
    workload, tried = small(), []

    def prepare(workload):
        tried.append(workload.real)
        return wrong(workload)

    variant = Variant("wrong", prepare)
    with pytest.raises(WrongGradientsError, match=r"off by .* nor are they right on 2 other batches"):
        PatientChecker(workload).check("wrong", variant, variant.prepare(workload))
    assert len(tried) == 3
    assert not torch.equal(tried[1], tried[2])


def test_the_first_batch_is_drawn_as_the_others_are():
    workload = packed()
    again = workload.redrawn(workloads.SEED)
    assert torch.equal(again.real, workload.real)
    assert torch.equal(again.fake, workload.fake)
    assert torch.equal(again.alpha, workload.alpha)
    assert not torch.equal(workload.redrawn(workloads.SEED + 1).alpha, workload.alpha)


def test_a_workload_whose_naive_step_is_wrong_is_reported_and_the_next_one_measured(monkeypatch, tmp_path):
    def wrong_once(workload):
        return (wrong_weight if workload.name == "mlp-1x3" else naive)(workload)

    monkeypatch.setitem(VARIANTS, "naive", Variant("sometimes wrong", wrong_once))
    points = [("mlp-1x3", "wgan-gp", 5), ("mlp-1x2", "wgan-gp", 5)]
    path, refused = series.measure(points, names=["ours"], device=torch.device("cpu"), folder=tmp_path, budget=0)
    assert len(refused) == 1
    assert "mlp-1x3/wgan-gp/5" in refused[0]
    assert list(results.read(path)["workloads"]) == ["mlp-1x2/wgan-gp/5"]


def test_a_wrong_baseline_stops_the_benchmark_from_judging_by_it(monkeypatch):
    workload = small()
    monkeypatch.setattr("wgan_fast.bench.check.naive", lambda workload, *_, computes="step": naive(workload))
    with pytest.raises(WrongGradientsError):
        Checker(workload).check("no-penalty", VARIANTS["no-penalty"], naive(workload, computes="loss"))


@pytest.mark.parametrize("naive_error", [1e-9, 3e-6])  # a lucky one, and one beyond the floor
def test_error_of_ours_may_be_twice_that_of_naive_or_four_roundings_and_no_more(naive_error, monkeypatch):
    workload = small()
    checker = Checker(workload)
    monkeypatch.setattr(checker, "_naive_error", lambda *_: naive_error)
    allowed = max(2 * naive_error, 4 * 2**-23)
    truth = checker._truth("step")

    def off_by(factor):
        def run(alpha):
            offset = torch.zeros_like(truth)
            offset[0] = factor * allowed * truth.norm()
            for parameter, gradient in zip(
                workload.critic.parameters(), (truth + offset).split([p.numel() for p in workload.critic.parameters()])
            ):
                parameter.grad = None
                parameter.grad_double = gradient

        step = Step(run, workload.critic)
        step.gradients = lambda: [parameter.grad_double for parameter in workload.critic.parameters()]
        return step

    checker.check("ours", VARIANTS["ours"], off_by(0.99))
    with pytest.raises(WrongGradientsError, match=f"ours on .* naive's are off by {naive_error:.1e}"):
        checker.check("ours", VARIANTS["ours"], off_by(1.01))


# Counted and timed


def test_memory_counts_what_is_alive_at_once():
    def run(alpha):
        first = torch.empty(1000, dtype=torch.uint8)
        view = first[10:]
        del first
        second = torch.empty(300, dtype=torch.uint8)
        del view
        del second
        torch.empty(1200, dtype=torch.uint8)

    assert peak_bytes(Step(run, nn.Linear(1, 1)), torch.device("cpu")) == 1300


def test_views_are_no_launches_and_products_are_counted():
    a, b = torch.randn(3, 5), torch.randn(5, 7)
    counted = count(lambda: (a.view(5, 3).t(), torch.add(a, 1), a @ b))
    assert (counted.launches, counted.flops) == (2, 2 * 3 * 5 * 7)


def test_rounds_time_every_step_and_scale_it():
    clock = [Step(lambda alpha: None, nn.Linear(1, 1), scale=scale) for scale in (1.0, 0.0)]
    times = interleaved({"a": clock[0], "b": clock[1]}, {"a": 1.0, "b": 1.0}, torch.device("cpu"), budget=0)
    assert len(times["a"]) == len(times["b"]) >= 5
    assert min(times["a"]) > 0
    assert max(times["b"]) == 0


@pytest.mark.parametrize("penalty", workloads.PENALTIES)
def test_limit_stands_for_the_flops_of_our_step(penalty):
    workload = workloads.build("toy-mlp", penalty=penalty, batch_size=9)
    step = ours(workload)
    step()
    replay = limit(workload, step)
    replayed = count(replay).flops
    assert replayed * replay.scale == pytest.approx(count(step).flops)
    # The replay does 10, 8, 7 or 6 forwards' worth itself, so the scale only corrects the ends of the network.
    assert replayed / forward_flops(workload) == pytest.approx(
        {"wgan-gp": 10, "r1-r2": 8, "r1": 7, "none": 6}[penalty], rel=0.02
    )


# Told


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    tmp_path = tmp_path_factory.mktemp("bench")
    arguments = ["--critic", f"{__name__}:packed_conv_critic", "--shape", "2x5x5", "--batch-sizes", "4"]
    main(["bench", *arguments, "--variants", "ours", "jax", "--seconds", "0", "--out", str(tmp_path)])
    return tmp_path


def test_command_leaves_results_a_table_and_a_plot(measured):
    (path,) = measured.glob("*.json")
    found = results.read(path)
    assert set(found["environment"]["versions"]) >= {"python", "torch", "wgan_fast"}
    ((key, workload),) = found["workloads"].items()
    assert key == f"{__name__}:packed_conv_critic/wgan-gp/4"
    assert set(workload["variants"]) == {"naive", "ours", "jax"}
    naive_found, ours_found = workload["variants"]["naive"], workload["variants"]["ours"]
    assert len(naive_found["milliseconds"]) == len(ours_found["milliseconds"]) >= 5
    assert ours_found["launches"] < naive_found["launches"]
    speed = results.ratio(workload, "naive", "ours")
    assert speed.low <= speed.median <= speed.high
    table = path.with_suffix(".md").read_text()
    assert f"{speed.median:.2f}" in table
    assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


def test_what_is_measured_already_is_not_measured_again(measured, monkeypatch):
    (path,) = measured.glob("*.json")
    before = path.read_bytes()
    ran = []
    monkeypatch.setattr(series, "run", lambda *_, **__: ran.append(1) or {"variants": {}, "title": "", "parameters": 0})
    options = {"device": torch.device("cpu"), "folder": measured, "budget": 0, "sample_shape": (2, 5, 5)}
    points = [(f"{__name__}:packed_conv_critic", "wgan-gp", 4)]
    series.measure(points, names=["ours"], **options)
    assert not ran
    assert path.read_bytes() == before
    series.measure(points, names=["ours", "field"], **options)
    assert len(ran) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--models", "nonsense"], "model must be one of toy-mlp, "),
        (["--models", "mlp-0x4"], "mlp-LAYERSxWIDTH"),
        (["--penalties", "nonsense"], "penalty must be one of wgan-gp, r1-r2, r1, none, got 'nonsense'"),
        (["--variants", "nonsense"], "variants must be among field, naive, "),
        (["--batch-sizes", "0"], "batch_size must be at least 1, got 0"),
        (["--models", "tabular-mlp", "--batch-sizes", "7"], "multiple of 10"),
        (["--critic", "nonsense:f", "--shape", "3"], "critic 'nonsense:f' cannot be imported"),
        (["--critic", "math:sqrt"], "needs the shape of one sample"),
        (["--critic", "os:getcwd", "--shape", "3"], "must return an nn.Module, got str"),
        (["--critic", f"{__name__}:broken_critic", "--shape", "3"], ":broken_critic' cannot be made: 'no such"),
        (
            ["--critic", f"{__name__}:packed_conv_critic", "--shape", "2x5x9"],
            ":packed_conv_critic' fails on samples of shape 2x5x9: mat1 and mat2 shapes cannot be multiplied",
        ),
        (
            ["--critic", f"{__name__}:two_scores", "--shape", "3", "--batch-sizes", "5"],
            ":two_scores' fails on samples of shape 3: critic must return one score per sample, shape [5] or [5, 1], "
            "got [5, 2]",
        ),
        (["--critic", "bc"], "critic must be module:function, got 'bc'"),
        (["--critic", "a:b", "--models", "dcgan-28"], "takes the place of models, so models dcgan-28 cannot be given"),
        (["--shape", "3x"], "shape must be sizes joined by x, such as 3x32x32, got '3x'"),
        (["--scaling", "--models", "language"], "scaling measures a list of its own, so models cannot be given"),
        (["--threads", "0"], "threads must be at least 1, got 0"),
        (["--seconds", "-1"], "seconds must be at least 0, got -1.0"),
        (["--device", "nonsense"], "device must be"),
    ],
)
def test_bad_input_is_one_line_that_names_it(arguments, message, tmp_path, capsys):
    with pytest.raises(SystemExit) as end:
        main(["bench", "--out", str(tmp_path / "out"), *arguments])
    assert end.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("wgan-fast: error: ")
    assert message in line
    assert not (tmp_path / "out").exists()


def test_trying_a_critic_of_ones_own_leaves_no_trace():
    before = torch.get_rng_state()
    critic = workloads.build(f"{__name__}:noisy_critic", sample_shape=(3,), batch_size=5).critic
    assert torch.equal(torch.get_rng_state(), before)
    assert critic[1].num_batches_tracked == 0
    assert torch.equal(critic[1].running_mean, torch.zeros(3))
    assert all(module.training for module in critic.modules())


def test_damaged_results_are_named(tmp_path):
    path = tmp_path / "results.json"
    path.write_text('{"environment": ')
    with pytest.raises(InputError, match=r"results\.json cannot be read"):
        results.read(path)


def test_summary_marks_where_we_lose():
    def variant(*milliseconds, **counts):
        return {"milliseconds": list(milliseconds)} | counts

    workload = {
        "title": "",
        "parameters": 1,
        "variants": {
            "naive": variant(10, 12, 14, units=12.0, launches=100, peak_bytes=100),
            "jax": variant(4, 4, 4),
            "ours": variant(5, 6, 7, units=10.0, launches=40, peak_bytes=130),
            "limit": variant(3, 3, 3),
        },
    }
    env = {"device": "Some CPU", "flags": [], "threads": 2, "versions": {"torch": "2"}, "commit": ""}
    found = {"environment": env, "workloads": {"m/wgan-gp/3": workload}}

    def cells(text):
        return [cell.strip() for cell in text.splitlines()[-1].strip("|").split("|")]

    assert cells(report.summary(found)) == ["m / wgan-gp / 3", "12 ms", "2.00", "**0.67** (JAX)", "50%", "**1.30**"]
    assert cells(report.overview(found)) == [
        "m / wgan-gp / 3", "12 ms", "", "2.00", "", "", "", "**0.67**", "", "50%", "**1.30**",
        "12.0 → 10.0", "100 → 40",
    ]  # fmt: skip


def test_summary_says_too_slow_of_what_was_skipped_for_its_time_and_of_nothing_else(monkeypatch):
    def inapplicable(workload):
        raise Skipped("not translated")

    def slow(workload):
        return Step(lambda alpha: time.sleep(0.5), workload.critic)

    def against_compiled_and_jax(*names):
        env = {"device": "Some CPU", "flags": [], "threads": 2, "versions": {"torch": "2"}, "commit": ""}
        measured = run(small(), [*names, "no-penalty"], budget=0)
        *_, row = report.overview({"environment": env, "workloads": {"m/wgan-gp/7": measured}}).splitlines()
        return [cell.strip() for cell in row.strip("|").split("|")][6:8]

    monkeypatch.setitem(VARIANTS, "naive-compiled", Variant("inapplicable", inapplicable))
    monkeypatch.setitem(VARIANTS, "jax", Variant("slow", slow, computes="nothing"))
    assert against_compiled_and_jax("naive-compiled", "jax") == ["", "too slow"]
    assert against_compiled_and_jax() == ["", ""]


def test_readme_shows_the_committed_results():
    readme = (CHECKOUT / "README.md").read_text()
    section = readme.partition(report.BEGIN)[2].partition(report.END)[0]
    assert section.strip() == report.readme_section(CHECKOUT / "benchmarks" / "results").strip(), "run `make report`"


def test_the_page_on_scaling_shows_the_committed_results():
    page = (CHECKOUT / "docs" / "scaling.md").read_text()
    section = page.partition(report.BEGIN)[2].partition(report.END)[0]
    folder = CHECKOUT / "benchmarks" / "results" / "scaling"
    assert list(folder.glob("*.json"))
    assert section.strip() == scaling.page_section(folder).strip(), "run `make report`"


def test_the_parts_of_our_time_add_up(tmp_path):
    def workload(naive, ours, limit, launches):
        times = (("naive", naive), ("ours", ours), ("limit", limit))
        variants = {name: {"milliseconds": [time] * 2} for name, time in times}
        for name in ("naive", "ours"):
            variants[name] |= {"launches": launches, "peak_bytes": 1_500_000}
        return {"variants": variants}

    # The first point is the cheapest: 100 operators take 1 ms beyond the limit.
    cheap, large = workload(4, 2, 1, 100), workload(30, 20, 12, 200)
    every = {scaling.key(model, batch): large for model, _, batch in scaling.points()}
    first = next(iter(scaling.SERIES["width, MLP"].values()))
    every[scaling.key(*first)] = cheap
    env = {"device": "Some CPU", "flags": [], "threads": 2, "versions": {"torch": "2"}, "commit": ""}
    found = {"environment": env, "workloads": every}
    text = scaling.section(found)
    assert "an operator costs 10.0 µs to start" in text
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines()]
    assert ["32", "4 ms", "2 ms", "2.00", "50%", "50%", "0%", "100 → 100", "1.5", "1.5"] in rows
    assert ["1,024", "30 ms", "20 ms", "1.50", "60%", "10%", "30%", "200 → 200", "1.5", "1.5"] in rows
    # A point that was refused or not reached is left out.
    del every[scaling.key("resnet-64", 8)]
    every[scaling.key("resnet-32", 8)] = {"variants": large["variants"] | {"ours": {"refused": "off by 1"}}}
    assert len(scaling.section(found).splitlines()) == len(text.splitlines()) - 2
    scaling.plot(found, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(("name", "parameters"), [("mlp-3x5", 81), ("mlp-1x2", 9), ("dcgan-28x4", 4_385)])
def test_critics_are_named_by_their_size(name, parameters):
    assert sum(p.numel() for p in workloads.build(name).critic.parameters()) == parameters
    assert tuple(workloads.build("resnet-16", batch_size=2).real.shape) == (2, 3, 16, 16)


def test_report_writes_only_between_the_markers(tmp_path):
    readme, folder = tmp_path / "README.md", tmp_path / "results"
    folder.mkdir()
    readme.write_text("before\n")
    with pytest.raises(InputError, match="must contain the lines"):
        report.update(readme, report.readme_section(folder))
    readme.write_text(f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n")
    for path in (CHECKOUT / "benchmarks" / "results").glob("*.json"):
        shutil.copy(path, folder)
        device = json.loads(path.read_text())["environment"]["device"]
        report.update(readme, report.readme_section(folder))
        assert device in readme.read_text()
    report.update(readme, report.readme_section(folder))
    once = readme.read_text()
    assert once.startswith("before\n")
    assert once.endswith("\nafter\n")
    assert "old" not in once
    report.update(readme, report.readme_section(folder))
    assert readme.read_text() == once


@pytest.mark.parametrize("name", ["stargan-8x4", "stylegan2-8x4", "amp"])
@pytest.mark.parametrize("penalty", ["wgan-gp", "r1"])
def test_critics_of_papers_are_translated_to_jax(name, penalty):
    pytest.importorskip("jax")
    workload = workloads.build(name, penalty=penalty, batch_size=4)
    steps = [VARIANTS[variant].prepare(workload) for variant in ("naive", "jax")]
    found = []
    for step in steps:
        step(workload.alpha)
        found.append([gradient.double().clone() for gradient in step.gradients()])
    truth, ours = found
    error = sum((a - b).square().sum() for a, b in zip(truth, ours)) / sum(a.square().sum() for a in truth)
    assert error**0.5 < 1e-4
