"""Whole networks are copied and laid out in memory whatever their layers hold."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from wgan_fast.training.networks import channels_last, copy_of, to_channels_last

pytestmark = pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated", "ignore:.*torch.jit.* is deprecated")


class Keeps(nn.Module):
    """Keeps what it computed last, in a list of a dictionary."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3)
        self.kept: dict[str, list[Tensor]] = {}

    def forward(self, x: Tensor) -> Tensor:
        self.kept["last"] = [self.layer(x)]
        return self.kept["last"][0]


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "weight_norm": lambda: nn.Sequential(nn.utils.weight_norm(nn.Linear(3, 3)), nn.ReLU(), nn.Linear(3, 1)),
    "spectral_norm": lambda: nn.utils.spectral_norm(nn.Linear(3, 1)),
    "parametrised": lambda: nn.utils.parametrizations.weight_norm(nn.Linear(3, 1)),
    "keeps activations": Keeps,
    "TorchScript": lambda: torch.jit.script(nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 1))),
    "partly frozen": lambda: nn.Sequential(nn.Linear(3, 5).requires_grad_(False), nn.Linear(5, 1)),
}


@pytest.mark.parametrize("called", [False, True])
@pytest.mark.parametrize("name", NETWORKS)
def test_copy_computes_the_same_and_learns_on_its_own(name, called):
    network, x = NETWORKS[name](), torch.randn(7, 3)
    output = network(x) if called else None
    copy = copy_of(network)
    before = [parameter.detach().clone() for parameter in network.parameters()]
    assert [p.requires_grad for p in copy.parameters()] == [p.requires_grad for p in network.parameters()]
    assert all(parameter.is_leaf for parameter in copy.parameters())
    # In eval mode: one more power iteration would change a spectral norm.
    torch.testing.assert_close(copy.eval()(x), network.eval()(x), rtol=0, atol=0)
    copy.train()(x).sum().backward()
    with torch.no_grad():
        for parameter in copy.parameters():
            assert (parameter.grad is None) == (not parameter.requires_grad)
            parameter.add_(1)
    assert not torch.equal(copy(x), network(x))
    assert all(torch.equal(parameter, value) for parameter, value in zip(network.parameters(), before))
    assert all(parameter.grad is None for parameter in network.parameters())
    if output is not None:
        output.sum().backward()
        assert any(parameter.grad is not None for parameter in network.parameters())


class ImagesAndVolumes(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.images, self.volumes = nn.Conv2d(2, 3, 3), nn.Conv3d(3, 5, 3)
        self.register_buffer("mask", torch.ones(1, 2, 5, 7))
        self.line = nn.Conv1d(2, 3, 3)


def test_weights_over_images_and_volumes_are_laid_out_each_in_its_way():
    network = ImagesAndVolumes()
    values = {name: value.clone() for name, value in network.state_dict().items()}
    to_channels_last(network)
    assert network.images.weight.is_contiguous(memory_format=torch.channels_last)
    assert network.volumes.weight.is_contiguous(memory_format=torch.channels_last_3d)
    assert network.mask.is_contiguous(memory_format=torch.channels_last)
    assert network.line.weight.is_contiguous()
    assert all(torch.equal(value, values[name]) for name, value in network.state_dict().items())


@pytest.mark.parametrize("shape", [(3,), (3, 5), (3, 2, 5), (3, 2, 5, 7), (3, 2, 5, 7, 3)])
def test_samples_keep_their_values_in_channels_last_memory(shape):
    samples = torch.randn(shape)
    laid_out = channels_last(samples)
    assert torch.equal(laid_out, samples)
    assert (laid_out is samples) == (len(shape) < 4)
    if len(shape) > 3:
        assert laid_out.stride(1) == 1
