"""Forms of the penalty that training loops write, against plain PyTorch: one process, in turns, medians.

    python benchmarks/forms.py --out benchmarks/results/forms      # measures; writes a file named after the CPU
    python benchmarks/forms.py --report docs/forms.md --out ...    # writes the page from what was measured

Every variant's gradients are compared in float64 before anything is timed.
"""

import argparse
import copy
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, softplus

from wgan_fast import CriticStep, gradient_penalty
from wgan_fast.bench.published import InteratomicPotential, StarGANDiscriminator, r3gan_discriminator
from wgan_fast.bench.results import environment, slug
from wgan_fast.bench.workloads import build
from wgan_fast.training.files import write_atomically

Step = Callable[[], None]
SECONDS = 8.0
"""Of timed rounds for each form."""


def usual(
    critic: Callable[[Tensor], Any], x: Tensor, pick: Callable[[Any], Tensor], target: float
) -> tuple[Any, Tensor]:
    """What the critic returns, and (‖∇D‖ − target)², as training scripts have them."""
    x = x.detach().requires_grad_()
    output = critic(x)
    (gradient,) = torch.autograd.grad(pick(output).sum(), x, create_graph=True)
    return output, ((gradient.flatten(1).norm(dim=1) - target) ** 2).mean()


def whole(output: Tensor) -> Tensor:
    return output


def r1_r2(critic: nn.Module, real: Tensor, fake: Tensor) -> dict[str, Step]:
    """R1 + R2 with the non-saturating loss, as StyleGAN's and R3GAN's loops have them."""

    def loss(real_scores: Tensor, fake_scores: Tensor) -> Tensor:
        return softplus(-real_scores).mean() + softplus(fake_scores).mean()

    def apart() -> None:
        penalties = [usual(critic, x, whole, 0.0)[1] for x in (real, fake)]
        (loss(critic(real), critic(fake)) + 5 * sum(penalties)).backward()

    def reused() -> None:
        (real_scores, r1), (fake_scores, r2) = (usual(critic, x, whole, 0.0) for x in (real, fake))
        (loss(real_scores, fake_scores) + 5 * (r1 + r2)).backward()

    def ours() -> None:
        options: dict[str, Any] = {"target": 0.0, "weight": 5.0, "return_scores": True}
        r1 = gradient_penalty(critic, real, at="real", **options)
        r2 = gradient_penalty(critic, fake=fake, at="fake", **options)
        (loss(r1.scores, r2.scores) + r1.penalty + r2.penalty).backward()

    return {"usual": apart, "usual, scores reused": reused, "ours": ours}


def stargan(critic: nn.Module, real: Tensor, fake: Tensor) -> dict[str, Step]:
    """WGAN-GP on a map, and the classes of real images: StarGAN's critic step."""
    labels = torch.arange(len(real)) % 5
    step = CriticStep(critic, loss=star_loss, score=0)
    alpha = torch.rand(len(real), dtype=real.dtype)

    def plain() -> None:
        a = alpha.view(-1, 1, 1, 1)
        _, penalty = usual(critic, a * real + (1 - a) * fake, lambda output: output[0], 1.0)
        (star_loss(critic(real), critic(fake), labels) + 10 * penalty).backward()

    return {"usual": plain, "ours": lambda: step(real, fake, alpha, loss_args=(labels,)) and None}


def star_loss(real: tuple[Tensor, Tensor], fake: tuple[Tensor, Tensor], labels: Tensor) -> Tensor:
    return fake[0].mean() - real[0].mean() + cross_entropy(real[1], labels)


def forces(model: nn.Module, positions: Tensor, target: Tensor) -> dict[str, Step]:
    """Energies and forces of a potential, from one forward."""
    energies = target.flatten(1).sum(1)

    def off(gradient: Tensor, given: Tensor) -> Tensor:
        return ((gradient + given) ** 2).flatten(1).sum(1)

    def plain() -> None:
        x = positions.clone().requires_grad_()
        energy = model(x)
        (gradient,) = torch.autograd.grad(energy.sum(), x, create_graph=True)
        ((energy - energies).square().mean() + off(gradient, target).mean()).backward()

    def total(x: Tensor, energies: Tensor, target: Tensor) -> Tensor:
        options: dict[str, Any] = {"weight": 1.0, "penalty": off, "penalty_args": (target,), "return_scores": True}
        found = gradient_penalty(model, points=x, **options)
        return (found.scores - energies).square().mean() + found.penalty

    compiled = torch.compile(total, fullgraph=True)
    return {
        "usual": plain,
        "ours": lambda: total(positions, energies, target).backward(),
        "ours, compiled": lambda: compiled(positions, energies, target).backward(),
    }


class Case:
    """A form: a network, two tensors, and what makes its variants."""

    def __init__(self, title: str, network: nn.Module, one: Tensor, two: Tensor, make: Callable[..., Any]) -> None:
        self.title, self.network, self.one, self.two, self.make = title, network, one, two, make

    def check(self) -> None:
        """Raise unless all variants leave the same gradients, in float64."""
        network = copy.deepcopy(self.network).double()
        found = []
        for name, step in self.make(network, self.one.double(), self.two.double()).items():
            network.zero_grad()
            step()
            found.append((name, torch.cat([p.grad.flatten() for p in network.parameters() if p.grad is not None])))
        for name, gradient in found[1:]:
            torch.testing.assert_close(gradient, found[0][1], rtol=1e-8, atol=1e-10, msg=f"{self.title}: {name}")

    def measure(self) -> dict[str, float]:
        """Return milliseconds by variant: medians of rounds in which all take turns."""
        steps = self.make(self.network, self.one, self.two)
        times: dict[str, list[float]] = {name: [] for name in steps}
        for step in steps.values():
            for _ in range(3):
                step()
        until = time.perf_counter() + SECONDS
        while time.perf_counter() < until or len(times["usual"]) < 5:
            for name, step in steps.items():
                self.network.zero_grad(set_to_none=True)
                start = time.perf_counter()
                step()
                times[name].append(1e3 * (time.perf_counter() - start))
        return {name: statistics.median(taken) for name, taken in times.items()}


def cases() -> dict[str, Case]:
    """Make every form; what is drawn is the same at every call."""
    torch.manual_seed(0)
    found = {}
    for name in ("toy-mlp", "dcgan-28"):
        work = build(name)
        found[f"r1-r2/{name}"] = Case(f"R1 + R2 and loss, {work.title}", work.critic, work.real, work.fake, r1_r2)
    images = torch.randn(2, 32, 3, 32, 32)
    found["r1-r2/r3gan-32"] = Case("R1 + R2 and loss, R3GAN, 3x32x32", r3gan_discriminator(32, 32), *images, r1_r2)
    images = torch.randn(2, 16, 3, 64, 64)
    title = "map, classes and WGAN-GP, StarGAN, 3x64x64"
    found["stargan/64"] = Case(title, StarGANDiscriminator(64, channels=32, classes=5), *images, stargan)
    for molecules, width in ((128, 64), (512, 64), (128, 128)):
        model = InteratomicPotential(atoms=16, width=width)
        atoms = torch.randn(2, molecules, 16, 3) * 2
        title = f"forces of {molecules} molecules of 16 atoms, width {width}"
        found[f"forces/{molecules}x16x{width}"] = Case(title, model, *atoms, forces)
    return found


def report(folder: Path) -> str:
    """Write the page from the files in a folder."""
    parts = [
        "# Forms, measured\n\nWritten by `make report` from [benchmarks/results/forms](../benchmarks/results/forms). "
        "Milliseconds are medians of rounds\nin which the variants take turns; what counts is their ratio. *Usual* "
        "is plain PyTorch as training scripts have it.\n[recipes.md](recipes.md) shows the code of each.\n"
    ]
    for path in sorted(folder.glob("*.json")):
        results = json.loads(path.read_text())
        here = results["environment"]
        parts.append(
            f"\n## {here['device']}, {here['threads']} threads\n\nPyTorch {here['versions']['torch']}, commit "
            f"{here['commit']}.\n\n| form | usual | ours; others | usual / ours |\n| --- | --- | --- | --- |\n"
        )
        for case in results["forms"].values():
            times = case["milliseconds"]
            others = "; ".join(f"{name} {taken:.1f}" for name, taken in times.items() if name not in ("usual", "ours"))
            ours = f"ours {times['ours']:.1f}" + (f"; {others}" if others else "")
            parts.append(
                f"| {case['title']} | {times['usual']:.1f} ms | {ours} | {times['usual'] / times['ours']:.2f} |\n"
            )
    return "".join(parts)


def main() -> None:
    """Measure, or write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--report", type=Path)
    parser.add_argument("--only", help="the forms whose name begins so")
    given = parser.parse_args()
    if given.report:
        write_atomically(given.report, report(given.out).encode())
        return
    here = environment(torch.device("cpu"))
    path = given.out / f"{slug(here)}.json"
    results: dict[str, Any] = {"environment": here, "forms": {}}
    given.out.mkdir(parents=True, exist_ok=True)
    for name, case in cases().items():
        if given.only and not name.startswith(given.only):
            continue
        case.check()
        found = case.measure()
        results["forms"][name] = {"title": case.title, "milliseconds": {k: round(v, 3) for k, v in found.items()}}
        print(name, {k: f"{v:.2f}" for k, v in found.items()}, f"usual / ours {found['usual'] / found['ours']:.2f}")
        write_atomically(path, (json.dumps(results, indent=1) + "\n").encode())


if __name__ == "__main__":
    main()
