"""The documents are finished, point to what is there, and show commands that the command line takes."""

import json
import re
import shlex
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest

from wgan_fast.training import TrainConfig, cli
from wgan_fast.training.description import Description

CHECKOUT = Path(__file__).parents[2]
PAGES = sorted(f"docs/{path.name}" for path in CHECKOUT.glob("docs/*.md"))
DOCUMENTS = ["README.md", "ARCHITECTURE.md", "CONTRIBUTING.md", "CHANGELOG.md", *PAGES]
FENCED = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)


def read(name: str) -> str:
    return (CHECKOUT / name).read_text()


def documented_commands(name: str) -> list[list[str]]:
    """What follows ``wgan-fast`` in the shell blocks of a document or in what the demo target runs."""
    if name == "Makefile":
        make = ["make", "--dry-run", "demo"]
        script = subprocess.run(make, cwd=CHECKOUT, capture_output=True, text=True, check=True).stdout
    else:
        script = "".join(body for language, body in FENCED.findall(read(name)) if language == "sh")
    lines = script.replace("\\\n", " ").replace(".venv/bin/", "").splitlines()
    words = [shlex.split(line, comments=True) for line in lines]
    return [arguments for program, *arguments in filter(None, words) if program == "wgan-fast"]


@pytest.mark.parametrize("name", DOCUMENTS)
def test_every_link_and_picture_of_the_project_is_there(name: str) -> None:
    prose = FENCED.sub("", read(name))
    targets = re.findall(r"\]\(([^)\s]+)", prose) + re.findall(r'(?:src|href)="([^"]+)"', prose)
    local = [target.partition("#")[0] for target in targets if not re.match(r"https?:|#", target)]
    folder = (CHECKOUT / name).parent
    assert [target for target in local if not (folder / target).exists()] == []


def test_every_document_is_in_the_navigation_of_the_site() -> None:
    assert sorted(re.findall(r"(?<=: )(?:docs/)?\w+\.md$", read("mkdocs.yml"), re.MULTILINE)) == sorted(DOCUMENTS)


def test_examples_in_docstrings_are_a_section_which_the_site_shows_as_code() -> None:
    sources = (CHECKOUT / "wgan_fast").rglob("*.py")
    assert [path.name for path in sources if re.search(r"\n\n +>>> ", path.read_text())] == []


@pytest.mark.parametrize("name", DOCUMENTS)
def test_nothing_is_left_to_fill_in(name: str) -> None:
    assert re.findall(r"\{[A-Z_]+\}", read(name)) == []


@pytest.mark.parametrize("name", DOCUMENTS)
def test_no_path_is_one_machines_own(name: str) -> None:
    assert re.findall(r"(?<![\w.])/(?:work|tmp|root|home)\b\S*", read(name)) == []


@pytest.mark.parametrize(
    ("name", "subcommands"),
    [
        ("README.md", {"train", "sample", "evaluate", "export", "info"}),
        ("docs/images.md", {"train"}),
        ("docs/samples.md", {"sample", "export"}),
        ("docs/tables.md", {"train", "sample", "evaluate"}),
        ("Makefile", {"train", "sample", "evaluate"}),
    ],
)
def test_documented_commands_are_taken(name: str, subcommands: set[str], monkeypatch: pytest.MonkeyPatch) -> None:
    taken = []
    on_tables = (cli.TrainTable, cli.SampleTable, cli.EvaluateTable)
    for command in (cli.Train, cli.Sample, cli.Evaluate, cli.Export, cli.Info, *on_tables):
        monkeypatch.setattr(command, "run", lambda self: taken.append(self))
    # The run that an example resumes or samples need not be there.
    monkeypatch.setattr(cli, "is_table_run", lambda folder: folder.name.endswith("-ctgan"))
    monkeypatch.setattr(Description, "read", lambda folder: SimpleNamespace(config=TrainConfig()))
    commands = documented_commands(name)
    assert {arguments[0] for arguments in commands} == subcommands
    for arguments in commands:
        cli.main(arguments)
    assert len(taken) == len(commands)


def test_figures_of_the_demo_are_those_of_the_committed_run() -> None:
    report = json.loads(read("docs/demo/evaluation.json"))
    readme = " ".join(read("README.md").split())
    assert f"({report['step']:,} generator steps)" in readme
    assert f"did not see is {report['sliced_wasserstein']:.3f};" in readme
    assert f"are {report['sliced_wasserstein_floor']:.3f} apart" in readme
    distances = "{frechet_distance:.2f} (real digits: {frechet_distance_floor:.2f})".format(**report)
    assert f"finds all {report['classes_covered']} classes among them, at a Fréchet distance of {distances}" in readme
    defaults = json.loads(read("docs/demo/defaults/evaluation.json"))
    assert f"--steps {defaults['step']}`" in readme
    assert f"reach all {defaults['classes_covered']} classes too" in readme
    assert f"Fréchet distance {defaults['frechet_distance']:.2f} (" in readme
    gaussians = [json.loads(read(f"docs/demo/25gaussians/seed-{seed}.json")) for seed in range(3)]
    assert all(found["modes_covered"] == 25 for found in gaussians)
    qualities = [found["high_quality"] for found in gaussians]
    assert f"with {min(qualities):.0%} to {max(qualities):.0%} of the samples of high quality" in readme


def test_figures_of_the_recorded_runs_are_those_of_their_files() -> None:
    lines = read("docs/quality.md").splitlines()
    for record in map(json.loads, read("docs/demo/metrics.jsonl").splitlines()):
        if "frechet_distance" in record and "held_out_wasserstein" in record:
            figures = "{held_out_wasserstein:.2f} | {frechet_distance:.2f} | {coverage:.2f} | {classes_covered}"
            assert f"| {record['step']:,} | {figures.format(**record)} |" in lines
    for name, folder in (("defaults", "docs/demo/defaults"), ("`make demo`", "docs/demo")):
        report = json.loads(read(f"{folder}/evaluation.json"))
        figures = "{frechet_distance:.2f} | {coverage:.2f} | {classes_covered} | {class_entropy:.2f}".format(**report)
        assert f"| {name}, {report['step']:,} steps | {figures} |" in lines
    for seed in range(3):
        report = json.loads(read(f"docs/demo/25gaussians/seed-{seed}.json"))
        row = "| {seed} | {modes_covered} of {modes} | {high_quality:.1%} |".format(seed=seed, **report)
        assert any(line.startswith(row) for line in lines)
