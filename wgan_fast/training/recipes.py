"""The methods, with their papers' defaults."""

from dataclasses import dataclass

from ..points import PenaltyConfig
from .config import Method


@dataclass(frozen=True)
class Recipe:
    """A method as its paper trains it.

    Attributes:
        source: The paper whose settings these are.
        loss: Name of the adversarial loss.
        penalty: The critic's penalty, or None.
        optimizer: "adam" or "rmsprop".
        learning_rate: Of both networks.
        betas: Adam's decay rates; RMSprop takes the second as its smoothing constant.
        n_critic: Critic steps per generator step.
        batch_size: Samples per step.
        clip: Bound c of the critic's weights after every step, or None.
        spectral_norm: Whether the critic's layers are spectrally normalised.
    """

    source: str
    loss: str
    penalty: PenaltyConfig | None = None
    optimizer: str = "adam"
    learning_rate: float = 1e-4
    betas: tuple[float, float] = (0.5, 0.9)
    n_critic: int = 1
    batch_size: int = 64
    clip: float | None = None
    spectral_norm: bool = False


_DCGAN_BETAS = (0.5, 0.999)

RECIPES: dict[Method, Recipe] = {
    "wgan-gp": Recipe(
        "Gulrajani et al. 2017, arXiv:1704.00028, with the moments of the authors' code",
        "wasserstein",
        PenaltyConfig.wgan_gp(),
        n_critic=5,
    ),
    "wgan-lp": Recipe("Petzka et al. 2018, arXiv:1709.08894", "wasserstein", PenaltyConfig.wgan_lp(), n_critic=5),
    "wgan-clip": Recipe(
        "Arjovsky et al. 2017, arXiv:1701.07875",
        "wasserstein",
        optimizer="rmsprop",
        learning_rate=5e-5,
        betas=(0.0, 0.99),
        n_critic=5,
        clip=0.01,
    ),
    "r1": Recipe(
        "Mescheder et al. 2018, arXiv:1801.04406",
        "non_saturating",
        PenaltyConfig.r1(),
        optimizer="rmsprop",
        betas=(0.0, 0.99),
    ),
    "dragan": Recipe(
        "Kodali et al. 2017, arXiv:1705.07215",
        "non_saturating",
        PenaltyConfig.dragan(),
        learning_rate=2e-4,
        betas=_DCGAN_BETAS,
    ),
    "gan": Recipe(
        "Goodfellow et al. 2014, arXiv:1406.2661, with the optimizer of Radford et al. 2016, arXiv:1511.06434",
        "non_saturating",
        learning_rate=2e-4,
        betas=_DCGAN_BETAS,
    ),
    "lsgan": Recipe("Mao et al. 2017, arXiv:1611.04076", "least_squares", learning_rate=2e-4, betas=_DCGAN_BETAS),
    "hinge": Recipe(
        "Miyato et al. 2018, arXiv:1802.05957",
        "hinge",
        learning_rate=2e-4,
        betas=(0.0, 0.9),
        n_critic=5,
        spectral_norm=True,
    ),
}
