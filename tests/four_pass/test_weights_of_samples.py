"""Layers whose weight is made of the samples: hypernetworks, modulated convolutions, a batch as the groups of one."""

import pytest
import textbook
import torch
import torch.nn.functional as F
from published_critics import StyleGenerator
from torch import Tensor, nn

from wgan_fast import gradient_penalty


class OfSamples(nn.Module):
    def __init__(self, forward) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.function, self.weights = forward, nn.Linear(6, 180)
        self.constant, self.kernel = nn.Parameter(torch.randn(5, 4, 4)), nn.Parameter(torch.randn(12, 4, 3, 3))
        self.again = nn.Parameter(torch.randn(12, 4, 3, 3))
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


def convolved_constant(m: OfSamples, x: Tensor) -> Tensor:
    """A learned constant under a kernel that each sample has of its own."""
    kernels = m.weights(x).tanh().view(-1, 5, 3, 3)  # four to a sample
    constant = m.constant.expand(len(x), -1, -1, -1).reshape(1, -1, 4, 4)
    return F.conv2d(constant, kernels, padding=1, groups=len(x)).view(len(x), -1).tanh()


def linear_constant(m: OfSamples, x: Tensor) -> Tensor:
    """A learned row, by a dense layer whose weights are those of the samples: an output each."""
    return F.linear(m.constant.view(1, 80), m.weights(x)[:, :80].tanh()).view(-1, 1).tanh()


def twice_grouped(m: OfSamples, x: Tensor) -> Tensor:
    """Two grouped convolutions in a row over a batch that is their groups: one sample of many channels."""
    N = len(x)
    h = m.weights(x)[:, :64].reshape(1, -1, 4, 4)
    h = F.conv2d(h, m.kernel[: 4 * N], padding=1, groups=N).view(N, 4, 4, 4).tanh()
    return F.conv2d(h.reshape(1, -1, 4, 4), m.again[: 4 * N], padding=1, groups=N).view(N, -1)


CASES = {"a constant, convolved": convolved_constant, "a constant, linear": linear_constant, "twice": twice_grouped}


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("name", CASES)
def test_gradients_are_those_of_autograd(name: str, batch: int) -> None:
    critic, x = OfSamples(CASES[name]), torch.randn(batch, 6, dtype=torch.float64)
    expected = textbook.penalty(critic, [x])
    theirs = textbook.gradients(expected, critic)
    ours = gradient_penalty(critic, points=x, engine="four_pass")
    torch.testing.assert_close(ours, expected, rtol=1e-10, atol=0)
    textbook.assert_equal_gradients(textbook.gradients(ours, critic), theirs)


@pytest.mark.parametrize("grouped", [False, True])
def test_a_style_generator_is_no_exception(grouped: bool) -> None:
    torch.manual_seed(1)
    generator = StyleGenerator(8, 4, grouped=grouped).double()
    with torch.no_grad():
        for parameter in generator.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    styles = torch.randn(3, generator.layers, 6, dtype=torch.float64)
    noise = torch.randn(3, 3, 8, 8, dtype=torch.float64)
    expected = textbook.penalty(lambda w: generator(w) * noise, [styles])
    theirs = textbook.gradients(expected, generator)
    ours = gradient_penalty(generator, points=styles, score=lambda images: images * noise, engine="four_pass")
    torch.testing.assert_close(ours, expected, rtol=1e-10, atol=0)
    textbook.assert_equal_gradients(textbook.gradients(ours, generator), theirs)
