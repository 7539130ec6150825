"""Every block of docs/recipes.md runs, and ours gives what the usual code above it gives."""

import contextlib
import functools
import io
import itertools
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from plain import N, assert_same_gradients
from published_critics import (
    GraphCritic,
    InteratomicPotential,
    MultiScale,
    SignedDistance,
    StarGANDiscriminator,
    StyleGenerator,
    TwoHeads,
)
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_leaves

PAGE = Path(__file__).parents[2] / "docs" / "recipes.md"
TEXT = PAGE.read_text()
FENCED = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
NAMES, *ENTRIES = re.split(r"^### ", TEXT, flags=re.MULTILINE)
(_, SETUP), *_ = FENCED.findall(NAMES)
ENTRY = {head: body for head, _, body in (entry.partition("\n") for entry in ENTRIES)}
OURS = re.compile(r"\b(gradient_penalty|GradientPenalty|CriticStep)\(")
ROW = re.compile(r"^\| [^|`]+ \| `(penalty = [^`]+)` \| `([^`]+)` \|$", re.MULTILINE)

COUNT = itertools.count()

Names = dict[str, Any]


def pairs(entry: str) -> list[tuple[str, str]]:
    """Every block of ours, and each row of a table, with the usual code above it."""
    found, usual = [], None
    for language, code in FENCED.findall(entry):
        if language != "python" or "explain" in code:
            continue
        if OURS.search(code):
            assert usual is not None, f"no usual code above this:\n{code}"
            found.append((usual, code))
        else:
            usual = code
    above = FENCED.findall(ENTRY["WGAN-GP"])[0][1].splitlines(keepends=True)[:2]
    for usual, options in ROW.findall(entry):
        found.append(
            ("".join([*above, "n = norm(g)\n", usual]), f"penalty = gradient_penalty(D, real, fake, {options})")
        )
    return found


PAIRS = [(head, usual, ours) for head, entry in ENTRY.items() for usual, ours in pairs(entry)]


def conv(*last: nn.Module) -> nn.Module:
    """A critic of images, steep enough for norms on both sides of 1."""
    critic = nn.Sequential(nn.Conv2d(3, 6, 4, 2, 1), nn.Tanh(), nn.Conv2d(6, 8, 3, 1, 1), nn.LeakyReLU(0.2), *last)
    with torch.no_grad():
        critic[0].weight.mul_(10)
        critic[2].weight.mul_(2.5)
    return critic


def scored() -> nn.Module:
    return conv(nn.Flatten(), nn.Linear(128, 1))


def mapped() -> nn.Module:
    return conv(nn.Conv2d(8, 1, 3, 1, 1))


def images(size: int = 8) -> Names:
    real, fake = torch.randn(2, N, 3, size, size)
    return {"real": real, "fake": fake}


def plain(**more: Any) -> Names:
    return {"D": scored(), **images(), "gamma": 10.0, **more}


def batches() -> Names:
    critic = scored()
    pairs = [tuple(torch.randn(2, N, 3, 8, 8)) for _ in range(6)]
    return {"D": critic, "batches": pairs, "gamma": 10.0, "optimizer": torch.optim.SGD(critic.parameters(), 0.01)}


class Tuple(nn.Module):
    """A score and features, or None."""

    def __init__(self, features: bool) -> None:
        super().__init__()
        self.body, self.score, self.features = conv(nn.Flatten()), nn.Linear(128, 1), features

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        h = self.body(x)
        return self.score(h), h if self.features else None


class Tokens(nn.Module):
    """A score for each of some tokens [N, T, 5] that attend to one another."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.attend, self.last = nn.Linear(5, 8), nn.Linear(8, 24), nn.Linear(8, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        query, key, value = self.attend(h).chunk(3, 2)
        return self.last(h + (query @ key.transpose(1, 2)).softmax(2) @ value).squeeze(2)


class Joint(nn.Module):
    """A critic of an image and a latent."""

    def __init__(self) -> None:
        super().__init__()
        self.image, self.last = conv(nn.Flatten()), nn.Sequential(nn.Linear(128 + 5, 8), nn.SiLU(), nn.Linear(8, 1))

    def forward(self, samples: dict[str, Tensor]) -> Tensor:
        return self.last(torch.cat([self.image(samples["image"]), samples["latent"]], 1))


class Labelled(nn.Module):
    """A critic of images and labels, apart or in one dict."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.label, self.score = conv(nn.Flatten()), nn.Embedding(3, 128), nn.Linear(128, 1)

    def forward(self, x: Tensor | dict[str, Tensor], labels: Tensor | None = None) -> Tensor:
        if isinstance(x, dict):
            x, labels = x["image"], x["label"]
        h = self.body(x)
        return self.score(h) + (h * self.label(labels)).sum(1, keepdim=True)


class ConditionFirst(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(4, 3, 1), scored()

    def forward(self, condition: Tensor, x: Tensor) -> Tensor:
        return self.last(self.first(torch.cat([condition, x], 1)))


class OfGraphs(nn.Module):
    """A score a graph of nodes [nodes, 5]."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(5, 8), nn.Linear(8, 1)

    def forward(self, x: Tensor, graph: Tensor) -> Tensor:
        h = torch.tanh(4 * self.first(x))
        pooled = torch.zeros(3, 8, dtype=x.dtype).index_add(0, graph, h)
        return self.last(nn.functional.leaky_relu(pooled, 0.2))


class Packed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(10, 16), nn.LeakyReLU(0.2), nn.Linear(16, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x.view(len(x) // 2, -1))


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.score = nn.LSTM(5, 8, batch_first=True), nn.Linear(8, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.score(self.lstm(x)[0][:, -1])


def molecules() -> Names:
    real, fake = ((torch.rand(N, 5, 5, 3), torch.rand(N, 5, 4)) for _ in range(2))
    return {"D": GraphCritic(), "real": real, "fake": fake}


def pictures_and_latents() -> Names:
    real, fake = ({"image": torch.randn(N, 3, 8, 8), "latent": torch.randn(N, 5)} for _ in range(2))
    return {"D": Joint(), "real": real, "fake": fake}


def labels() -> Names:
    return {"labels": torch.randint(3, (N,)), "fake_labels": torch.randint(3, (N,))}


def labelled_samples() -> Names:
    label = torch.randint(3, (N,))
    real, fake = ({"image": torch.randn(N, 3, 8, 8), "label": label} for _ in range(2))
    return {"D": Labelled(), "real": real, "fake": fake}


def graphs() -> Names:
    real, fake = torch.randn(2, 9, 5)
    return {"D": OfGraphs(), "real": real, "fake": fake, "graph": torch.tensor([0, 0, 1, 1, 1, 1, 2, 2, 2])}


def rows() -> Names:
    real, fake = torch.randn(2, N, 5)
    return {"D": Packed(), "real": real, "fake": fake}


def atoms() -> Names:
    positions = torch.randn(N, 5, 3)
    forces, energies = torch.randn_like(positions), torch.randn(N)
    return {"model": InteratomicPotential(), "positions": positions, "forces": forces, "energies": energies}


def styles() -> Names:
    G = StyleGenerator()
    styles = torch.randn(N, G.layers, 6)
    return {"G": G, "styles": styles, "mean": torch.tensor(0.4), "shape": G(styles).shape}


def scaled() -> Names:
    critic = scored()
    optimizer = torch.optim.SGD(critic.parameters(), 0.01)
    return {"D": critic, **images(), "optimizer": optimizer, "scaler": torch.amp.GradScaler("cpu", init_scale=2.0**10)}


MADE: dict[str, list[Callable[[], Names]]] = {
    "A tuple": [lambda: {"D": Tuple(True), **images()}, lambda: {"D": Tuple(False), **images()}],
    "A dict": [lambda: {"D": TwoHeads(), **images()}],
    "A map, a score per token, several scores": [
        lambda: {"D": mapped(), **images()},
        lambda: {"D": Tokens(), "real": torch.randn(N, 4, 5), "fake": torch.randn(N, 4, 5)},
        lambda: {"D": conv(nn.Flatten(), nn.Linear(128, 3)), **images()},
    ],
    "A list of maps": [lambda: {"D": MultiScale(), **images(32)}],
    "Scores whose mean is differentiated": [lambda: {"D": mapped(), **images()}],
    "A class loss that is differentiated": [lambda: {"D": StarGANDiscriminator(), **images(16), **labels()}],
    "A tuple of tensors": [molecules],
    "A norm each tensor": [molecules],
    "A dict of tensors": [pictures_and_latents],
    "Integer labels among them": [labelled_samples],
    "Labels beside them": [lambda: {"D": Labelled(), **images(), **labels()}],
    "A condition first": [
        lambda: {"D": ConditionFirst(), **images(), "condition": torch.randn(N, 1, 8, 8)},
        lambda: {"D": ConditionFirst(), **images(), "condition": torch.randn(N, 1, 8, 8).requires_grad_()},
    ],
    "Real and fake with labels of their own": [lambda: {"D": Labelled(), **images(), **labels()}],
    "Graphs of unequal size": [graphs],
    "Packed rows": [rows],
    "Points of my own": [lambda: {"D": scored(), "points": torch.randn(N, 3, 8, 8)}],
    "An alpha of my own": [plain],
    "WGAN-GP": [plain],
    "Another function of the gradient": [plain],
    "R1 or R2": [plain],
    "R1 and R2": [plain],
    "DRAGAN": [plain],
    "Forces": [atoms],
    "The eikonal term": [lambda: {"network": SignedDistance(), "points": torch.randn(N, 3)}],
    "Path length": [styles],
    "Norms for a log": [plain],
    "Scores and R1 from one forward": [plain],
    "R1 and R2 with the loss": [plain],
    "The whole critic step": [plain],
    "A class loss on the same output": [
        lambda: {"D": StarGANDiscriminator(), **images(16), **labels()},
        lambda: {"D": StarGANDiscriminator(), **images(16), **labels()},
    ],
    "Feature matching": [lambda: {"D": TwoHeads(), **images()}],
    "Lazy regularisation": [batches],
    "Part of the batch": [plain],
    "Accumulated gradients": [batches],
    "Under torch.compile": [plain],
    "Under DistributedDataParallel": [lambda: {"D": DistributedDataParallel(scored()), **images()}],
    "Under autocast": [plain],
    "With a GradScaler": [scaled],
    "What runs on autograd instead": [
        lambda: {"D": scored(), **images(), "recurrent": Recurrent(), "sequences": torch.randn(N, 4, 5)}
    ],
}


@pytest.fixture(autouse=True)
def _in_float64() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture
def surroundings(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """What an entry needs to be around it: processes, or a compiler that draws PyTorch's numbers, and is quick."""
    head = request.node.callspec.params["head"]
    if head == "Under DistributedDataParallel":
        monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
        torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    if head == "Under torch.compile":
        torch.compiler.reset()
        monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    yield
    if head == "Under DistributedDataParallel":
        torch.distributed.destroy_process_group()


def given(make: Callable[[], Names]) -> Names:
    torch.manual_seed(0)
    return make()


def module() -> Names:
    """The names of a module of a reader's own, with the page's beginning run."""
    name = f"recipe_{next(COUNT)}"
    sys.modules[name] = ModuleType(name)  # torch.compile looks modules up by their names, and keeps what it found
    names = vars(sys.modules[name])
    exec(SETUP, names)
    return names


def run(code: str, make: Callable[[], Names]) -> tuple[Names, list[Tensor]]:
    """Run a block as a reader would, and go backwards from what it computed unless it has done so."""
    names, made = module(), given(make)
    names.update(made)
    torch.manual_seed(1)
    exec(code, names)
    modules = [value for value in made.values() if isinstance(value, nn.Module)]
    tensors = [p for module in modules for p in module.parameters()]
    tensors += [leaf for leaf in tree_leaves(made) if isinstance(leaf, Tensor) and leaf.requires_grad]
    if all(t.grad is None for t in tensors):
        names["loss" if "loss" in names else "penalty"].backward()
    return names, tensors


def compare(usual: str, ours: str, make: Callable[[], Names]) -> None:
    """Hold what both blocks name, the gradients and the weights against each other, to 1e-10."""
    (expected, theirs), (found, left) = run(usual, make), run(ours, make)
    made = given(make)
    common = [
        name
        for name in ("penalty", "loss", "norms", "real_scores", "fake_scores")
        if name not in made and isinstance(expected.get(name), Tensor) and isinstance(found.get(name), Tensor)
    ]
    assert common or re.search("^for ", ours, re.MULTILINE), "neither names the same result"
    for name in common:
        torch.testing.assert_close(found[name].detach(), expected[name].detach(), rtol=1e-10, atol=1e-13)
    assert any(t.grad is not None and t.grad.abs().max() > 1e-9 for t in theirs), "nothing to compare"
    compiled = "torch.compile" in ours  # the compiler leaves zeros in the place of None
    assert_same_gradients(
        *([torch.zeros_like(t) if t.grad is None and compiled else t.grad for t in each] for each in (left, theirs))
    )
    assert_same_gradients([t.detach() for t in left], [t.detach() for t in theirs])


@pytest.mark.filterwarnings("error:wgan_fast:RuntimeWarning")
@pytest.mark.usefixtures("surroundings")
@pytest.mark.parametrize(("head", "usual", "ours"), PAIRS, ids=[f"{head}-{i}" for i, (head, _, _) in enumerate(PAIRS)])
def test_ours_is_the_usual_code(head: str, usual: str, ours: str) -> None:
    for make in MADE[head]:
        compare(usual, ours, make)


@pytest.mark.parametrize("head", [head for head, entry in ENTRY.items() if "explain(" in entry])
def test_what_is_said_to_be_printed_is_printed(head: str) -> None:
    blocks = FENCED.findall(ENTRY[head])
    assert [language for language, _ in blocks] == ["python", "text"] * (len(blocks) // 2)
    (make,) = MADE[head]
    for (_, code), (_, text) in zip(blocks[::2], blocks[1::2]):
        names = module()
        names.update(given(make))
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            exec(code, names)
        assert printed.getvalue() == text


def test_every_block_and_every_row_is_compared() -> None:
    blocks = [code for language, code in FENCED.findall(TEXT) if language == "python"]
    compared = {code for _, usual, ours in PAIRS for code in (usual, ours)}
    printed = {code for code in blocks if "explain(" in code}
    assert [code for code in blocks if code not in compared | printed | {SETUP}] == []
    assert {head for head, _, _ in PAIRS} | {"What runs on autograd instead"} == set(ENTRY) == set(MADE)
    table = [line for line in ENTRY["Another function of the gradient"].splitlines() if line.startswith("|")]
    assert len(table) - 2 == len(ROW.findall(ENTRY["Another function of the gradient"])) > 10
    assert [usual for _, usual, _ in PAIRS if OURS.search(usual)] == []


def test_a_block_that_is_wrong_is_noticed() -> None:
    usual, ours = next((usual, ours) for head, usual, ours in PAIRS if head == "WGAN-GP")
    compare(usual, ours, plain)
    for wrong in (ours.replace("fake)", "fake, weight=11)"), ours.replace("penalty =", "other ="), "penalty = 1.0"):
        with pytest.raises((AssertionError, KeyError, AttributeError)):
            compare(usual, wrong, plain)


def anchor(heading: str) -> str:
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def test_the_table_leads_to_every_entry() -> None:
    contents = TEXT.partition("\n## ")[0]
    links = re.findall(r"\]\(#([^)]+)\)", contents)
    assert links == [anchor(head) for head in ENTRY]
    headings = {anchor(head) for head in re.findall(r"^#+ (.+)$", TEXT, re.MULTILINE)}
    assert set(re.findall(r"\]\(#([^)]+)\)", TEXT)) <= headings
    files = re.findall(r"\]\(([^#)]+)\)", TEXT)
    assert [name for name in files if not (PAGE.parent / name).exists()] == []
    assert re.findall(r"(?<![\w.])/(?:work|tmp|root|home)\b\S*", FENCED.sub("", TEXT)) == []
