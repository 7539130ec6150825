"""The checks of a change run as they would on a fresh machine, wherever they are started."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).parents[2]
SHELLS_OWN = {"PWD", "OLDPWD", "SHLVL", "_"}


@pytest.fixture
def started(tmp_path: Path) -> Path:
    """A checkout with nothing but the script, whose make and wgan-fast write down how they were started."""
    (tmp_path / ".ci").mkdir()
    shutil.copy(CHECKOUT / ".ci" / "run", tmp_path / ".ci")
    for program in ("bin/make", ".venv/bin/wgan-fast"):
        path = tmp_path / program
        path.parent.mkdir(parents=True)
        path.write_text(f'#!/bin/sh\nenv -0 > "{tmp_path}/environment"\necho "$0 $*" >> "{tmp_path}/said"\n')
        path.chmod(0o755)
    return tmp_path


def run(checkout: Path, cwd: str, stdin: int | None = subprocess.DEVNULL, **environment: str) -> dict[str, str]:
    """Run the script, without standard input where ``stdin`` is None; returns the environment of what it starts."""
    command = ["bash", os.path.relpath(checkout / ".ci" / "run", cwd)]
    path = f"{checkout / 'bin'}:{os.environ['PATH']}"
    close = {} if stdin is not None else {"preexec_fn": lambda: os.close(0)}
    subprocess.run(command, cwd=cwd, stdin=stdin, env={"PATH": path, **environment}, check=True, timeout=60, **close)
    given = (checkout / "environment").read_text().rstrip("\0").split("\0")
    return dict(variable.split("=", 1) for variable in given if variable.split("=")[0] not in SHELLS_OWN)


@pytest.mark.parametrize("cwd", [".", ".ci", ".."])
def test_checks_see_nothing_of_the_callers_environment(started, cwd):
    kept = {"HOME": "/h o m e", "CI": "true", "LANG": "C.UTF-8", "PIP_CERT": "a\nb", "PIP_FIND_LINKS": "wheels"}
    kept |= {"SSL_CERT_FILE": "pem", "REQUESTS_CA_BUNDLE": "pem"}
    hidden = {"PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": "x", "MAKEFLAGS": "-n"}
    seen = run(started, str(started / cwd), **kept, **hidden)
    assert seen.pop("PATH").startswith(str(started / "bin"))
    assert seen == kept
    said = (started / "said").read_text()
    for step in ("make test", "make check", "wgan-fast info", "wgan-fast train --resume"):
        assert step in said


def test_checks_need_no_variables_and_no_standard_input(started):
    seen = run(started, str(started), stdin=None)
    assert seen.keys() == {"PATH", "LANG"}
