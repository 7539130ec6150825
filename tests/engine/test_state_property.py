"""Random critics, changed at random between calls, in every state that forward may read: each step as by autograd."""

import changing_critics
import pytest
from changing_critics import CHANGES, SCALES, Subject

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # to leave a critic to autograd is right, too


@pytest.fixture(autouse=True)
def _globals_restored():
    yield
    SCALES.clear()
    changing_critics.SHIFT = 0.0


def check(seed: int, changes: int = 5) -> None:
    subject = Subject(seed)
    history: list[str] = []
    try:
        subject.check()
        for _ in range(changes):
            change = subject.draw.choice(CHANGES)
            history.append(change.__name__)
            change(subject)
            subject.check()
    except Exception as error:
        error.add_note(f"seed {seed}, after {history}, blocks in a {subject.critic.holder}:\n{subject.critic}")
        raise
    finally:
        subject.remove_hooks()


@pytest.mark.parametrize("seed", range(12))
def test_a_random_critic_may_change_at_random(seed: int, capfd: pytest.CaptureFixture[str]) -> None:
    check(seed)
    assert capfd.readouterr() == ("", "")


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(12, 332))
def test_many_random_critics_may_change_at_random(seed: int, capfd: pytest.CaptureFixture[str]) -> None:
    check(seed)
    assert capfd.readouterr() == ("", "")
