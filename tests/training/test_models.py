"""The networks are those of the papers they are named after."""

import math
import re
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wgan_fast.errors import InputError
from wgan_fast.training import models, weights

SHAPES = {
    "toy-mlp": (3,),
    "mlp": (2, 5, 7),
    "mnist-dcgan": (1, 28, 28),
    "cifar-dcgan": (3, 32, 32),
    "cifar-resnet": (3, 32, 32),
    "dcgan64": (3, 64, 64),
    "dcgan": (3, 16, 16),
    "article": (1, 28, 28),
}
IMAGES = [name for name, shape in SHAPES.items() if len(shape) == 3]
every_model = pytest.mark.parametrize("name", SHAPES)


def small(name: str, shape: tuple[int, ...] | None = None, **options) -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    return models.build(name, shape or SHAPES[name], width=6, **options)


def layer_sizes(module: nn.Module) -> list[int]:
    """Parameters of every layer that has some, in the order of execution."""
    counts = (sum(p.numel() for p in layer.parameters(recurse=False)) for layer in module.modules())
    return [count for count in counts if count]


def conv(kernel: int, channels_in: int, channels_out: int) -> int:
    return kernel**2 * channels_in * channels_out + channels_out


def linear(units_in: int, units_out: int) -> int:
    return (units_in + 1) * units_out


def test_every_model_of_the_registry_is_tested_here():
    assert set(SHAPES) == set(models.MODELS)


# Layer by layer from the paper's code, DIM written out; `2 * C` is the scale and offset of a norm over C channels.
PAPER_LAYERS = {
    # gan_toy.py, with the generic D in place of 2
    "toy-mlp": (
        [linear(3, 512), linear(512, 512), linear(512, 512), linear(512, 3)],
        [linear(3, 512), linear(512, 512), linear(512, 512), linear(512, 1)],
    ),
    "mlp": (
        [linear(128, 512), linear(512, 512), linear(512, 512), linear(512, 2 * 5 * 7)],
        [linear(2 * 5 * 7, 512), linear(512, 512), linear(512, 512), linear(512, 1)],
    ),
    # gan_mnist.py
    "mnist-dcgan": (
        [linear(128, 4 * 4 * 256), conv(5, 256, 128), conv(5, 128, 64), conv(5, 64, 1)],
        [conv(5, 1, 64), conv(5, 64, 128), conv(5, 128, 256), linear(4 * 4 * 256, 1)],
    ),
    # gan_cifar.py; convolutions before a batch norm have no bias here
    "cifar-dcgan": (
        [
            linear(128, 4 * 4 * 512),
            *(2 * 512, 25 * 512 * 256),
            *(2 * 256, 25 * 256 * 128),
            *(2 * 128, conv(5, 128, 3)),
        ],
        [conv(5, 3, 128), conv(5, 128, 256), conv(5, 256, 512), linear(4 * 4 * 512, 1)],
    ),
    # gan_cifar_resnet.py with its NORMALIZATION_D on; a block lists its residual branch, then its shortcut
    "cifar-resnet": (
        [
            linear(128, 4 * 4 * 128),
            *3 * [2 * 128, 9 * 128 * 128, 2 * 128, 9 * 128 * 128, 128 * 128],
            *(2 * 128, conv(3, 128, 3)),
        ],
        [
            *(conv(3, 3, 128), conv(3, 128, 128), conv(1, 3, 128)),
            *(2 * 128, conv(3, 128, 128), 2 * 128, conv(3, 128, 128), conv(1, 128, 128)),
            *2 * [2 * 128, conv(3, 128, 128), 2 * 128, conv(3, 128, 128)],
            linear(128, 1),
        ],
    ),
    # DCGANGenerator and DCGANDiscriminator of gan_64x64.py, the critic without its norms
    "dcgan64": (
        [
            linear(128, 4 * 4 * 512),
            *(2 * 512, 25 * 512 * 256),
            *(2 * 256, 25 * 256 * 128),
            *(2 * 128, 25 * 128 * 64),
            *(2 * 64, conv(5, 64, 3)),
        ],
        [conv(5, 3, 64), conv(5, 64, 128), conv(5, 128, 256), conv(5, 256, 512), linear(4 * 4 * 512, 1)],
    ),
    # as dcgan64, from 4x4 in two convolutions
    "dcgan": (
        [linear(128, 4 * 4 * 128), *(2 * 128, 25 * 128 * 64), *(2 * 64, conv(5, 64, 3))],
        [conv(5, 3, 64), conv(5, 64, 128), linear(4 * 4 * 128, 1)],
    ),
    "article": (
        [
            *(linear(100, 256), 2 * 256),
            *(linear(256, 512), 2 * 512),
            *(linear(512, 1024), 2 * 1024),
            linear(1024, 784),
        ],
        [conv(5, 1, 64), conv(5, 64, 128), linear(7 * 7 * 128, 1)],
    ),
}


@every_model
def test_layers_have_the_papers_number_of_parameters(name):
    with torch.device("meta"):
        generator, critic = models.build(name, SHAPES[name])
    assert (layer_sizes(generator), layer_sizes(critic)) == PAPER_LAYERS[name]


def parameters(module: nn.Module) -> list[Tensor]:
    return [p.detach() for p in module.parameters()]


def test_mnist_networks_compute_the_papers_functions():
    generator, critic = (network.double() for network in small("mnist-dcgan"))
    z = torch.randn(3, 128, dtype=torch.float64)
    w, b, *filters = parameters(generator)
    x = F.linear(z, w, b).relu().reshape(3, 24, 4, 4)
    for layer in range(3):
        x = F.conv_transpose2d(x, *filters[2 * layer : 2 * layer + 2], stride=2, padding=2, output_padding=1)
        if layer == 0:
            x = x[:, :, :7, :7]  # as in the paper's code
        x = x.relu() if layer < 2 else x.tanh()
    torch.testing.assert_close(generator(z), x, rtol=1e-12, atol=1e-12)

    *filters, w, b = parameters(critic)
    for layer in range(3):
        x = F.conv2d(x, *filters[2 * layer : 2 * layer + 2], stride=2, padding=2)
        x = torch.maximum(0.2 * x, x)
    scores = F.linear(x.reshape(3, -1), w, b).reshape(-1)
    torch.testing.assert_close(critic(generator(z)), scores, rtol=1e-12, atol=1e-12)


def test_resnet_critic_computes_the_papers_function():
    critic = small("cifar-resnet")[1].double()
    for p in critic.parameters():
        nn.init.normal_(p, std=0.5)  # so that scales, offsets and biases all matter
    values = iter(parameters(critic))

    def take(count: int) -> list[Tensor]:
        return [next(values) for _ in range(count)]

    def mean_pool(x: Tensor) -> Tensor:
        return (x[..., ::2, ::2] + x[..., 1::2, ::2] + x[..., ::2, 1::2] + x[..., 1::2, 1::2]) / 4

    def layer_norm(x: Tensor) -> Tensor:
        scale, offset = take(2)
        centred = x - x.mean((1, 2, 3), keepdim=True)
        normal = centred / (centred.square().mean((1, 2, 3), keepdim=True) + 1e-5).sqrt()
        return normal * scale[:, None, None] + offset[:, None, None]

    x = images = torch.rand(3, 3, 32, 32, dtype=torch.float64) * 2 - 1
    residual = F.conv2d(F.conv2d(x, *take(2), padding=1).relu(), *take(2), padding=1)
    x = mean_pool(residual) + F.conv2d(mean_pool(x), *take(2))
    residual = F.conv2d(layer_norm(x).relu(), *take(2), padding=1)
    residual = F.conv2d(layer_norm(residual).relu(), *take(2), padding=1)
    x = mean_pool(residual) + mean_pool(F.conv2d(x, *take(2)))  # the paper convolves this shortcut first
    for _ in range(2):
        residual = F.conv2d(layer_norm(x).relu(), *take(2), padding=1)
        x = x + F.conv2d(layer_norm(residual).relu(), *take(2), padding=1)
    scores = F.linear(x.relu().mean((2, 3)), *take(2)).reshape(-1)
    torch.testing.assert_close(critic(images), scores, rtol=1e-11, atol=1e-11)


def test_residual_block_upsamples_the_shortcut_as_the_paper_does():
    torch.manual_seed(0)
    block = models.ResidualBlock(3, 5, resample="up", norm="batch").double().eval()
    with torch.no_grad():
        block.residual[-1].weight.zero_()
    x = torch.randn(2, 3, 4, 4, dtype=torch.float64)
    repeated = x.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
    torch.testing.assert_close(block(x), F.conv2d(repeated, block.shortcut[0].weight), rtol=1e-12, atol=1e-12)


@every_model
@pytest.mark.parametrize("batch", [1, 3, 7])
def test_generator_makes_samples_and_critic_one_score_each(name, batch):
    generator, critic = small(name)
    generator.eval()  # batch norm cannot train on one sample
    samples = generator(torch.randn(batch, generator.latent_dim))
    assert samples.shape == (batch, *SHAPES[name])
    assert critic(samples).shape == (batch,)


@pytest.mark.parametrize("name", IMAGES)
@pytest.mark.parametrize("channels", [1, 2, 4])
def test_image_models_work_with_any_number_of_channels(name, channels):
    shape = (channels, *SHAPES[name][1:])
    generator, critic = small(name, shape)
    samples = generator(torch.randn(2, generator.latent_dim))
    assert samples.shape == (2, *shape)
    assert critic(samples).shape == (2,)


@pytest.mark.parametrize("name", IMAGES)
def test_images_fill_the_range_from_minus_one_to_one_and_never_leave_it(name):
    generator, _ = small(name)
    with torch.no_grad():
        last_weight = [p for key, p in generator.named_parameters() if key.endswith("weight")][-1]
        last_weight.mul_(1e3)
        samples = generator(torch.randn(5, generator.latent_dim))
    assert samples.abs().max() <= 1
    assert samples.min() < -0.9
    assert samples.max() > 0.9


def test_vectors_are_not_bounded():
    generator, _ = small("toy-mlp")
    with torch.no_grad():
        generator[-2].bias.fill_(7.0)
        assert generator(torch.randn(5, 3)).min() > 1


@every_model
def test_every_parameter_gets_a_gradient(name):
    generator, critic = (network.double() for network in small(name))
    samples = generator(torch.randn(5, generator.latent_dim, dtype=torch.float64))
    weights = torch.tensor([1.0, -2.0, 3.0, 0.5, -1.5], dtype=torch.float64)  # a plain sum is blind to batch norm
    (critic(samples) * weights).sum().backward()
    gradients = {
        f"{part}.{key}": p.grad.abs().max().item()
        for part, network in (("generator", generator), ("critic", critic))
        for key, p in network.named_parameters()
    }
    # A parameter that cannot matter would be left with rounding: 1e-16 of the largest gradient.
    limit = 1e-10 * max(gradients.values())
    assert [key for key, size in gradients.items() if size < limit] == []


@every_model
def test_a_score_depends_on_its_own_sample_only(name):
    _, critic = small(name)
    critic.double()
    samples = torch.randn(5, *SHAPES[name], dtype=torch.float64)
    others = torch.randn(5, *SHAPES[name], dtype=torch.float64)
    others[2] = samples[2]
    torch.testing.assert_close(critic(samples)[2], critic(others)[2], rtol=1e-12, atol=1e-12)
    assert not torch.allclose(critic(samples)[1], critic(others)[1])


@every_model
def test_both_networks_can_be_exported_with_a_dynamic_batch(name):
    generator, critic = (network.eval() for network in small(name))
    z = torch.randn(3, generator.latent_dim)
    for network, example, other in (
        (generator, z, torch.randn(5, generator.latent_dim)),
        (critic, generator(z).detach(), torch.randn(5, *SHAPES[name])),
    ):
        program = torch.export.export(
            network, (example,), dynamic_shapes=({0: torch.export.Dim("batch")},), strict=False
        )
        torch.testing.assert_close(program.module()(other), network(other))


def test_layer_norm_and_dropout_are_options_of_the_dcgan_critic():
    kinds = [type(layer) for layer in models.dcgan_critic((3, 64, 64), 6, stages=2, layer_norm=True, dropout=0.3)]
    first = [nn.Conv2d, nn.LeakyReLU, nn.Dropout]
    assert kinds == [*first, nn.Conv2d, nn.GroupNorm, *first[1:], nn.Flatten, nn.Linear]


def test_layer_norm_of_the_resnet_critic_can_be_left_out():
    critic = models.resnet_critic((3, 32, 32), 6, layer_norm=False)
    assert not any(isinstance(layer, nn.GroupNorm) for layer in critic.modules())


@pytest.mark.parametrize(
    ("shape", "name"),
    [
        ((2,), "toy-mlp"),
        ((1000,), "toy-mlp"),
        ((1, 28, 28), "mnist-dcgan"),
        ((3, 32, 32), "cifar-dcgan"),
        ((3, 64, 64), "dcgan64"),
        ((1, 16, 16), "dcgan"),
        ((3, 128, 128), "dcgan"),
        ((1, 256, 256), "dcgan"),
        ((1, 8, 8), "mlp"),
        ((3, 18, 18), "mlp"),
        ((28, 28), "mlp"),
    ],
)
def test_default_model_suits_the_sample_shape(shape, name):
    assert models.default_model(shape) == name
    models.build(name, shape, width=2)


@pytest.mark.parametrize(
    ("shape", "advice"),
    [
        ((3, 64, 63), "16, 32, 64, 128 or 256 pixels (--image-size 32), or give --model mlp"),
        ((3, 100, 100), "(--image-size 64)"),
        ((1, 512, 768), "(--image-size 256)"),
        ((100, 3, 8), "(--image-size 16)"),
        ((100, 12), "samples of shape [100, 12]: give --model mlp, or networks of your own (--model module:function)"),
    ],
)
def test_no_model_is_chosen_for_other_large_samples_but_what_fits_is_named(shape, advice):
    with pytest.raises(InputError, match=re.escape(advice)):
        models.default_model(shape)


@pytest.mark.parametrize("side", models.SIDES)
@pytest.mark.parametrize("channels", [1, 3])
def test_a_dcgan_of_any_size_goes_down_to_4x4_and_begins_where_the_penalty_wants_it(side, channels):
    torch.manual_seed(0)
    generator, critic = models.build("dcgan", (channels, side, side), width=16)
    convolutions = [layer for layer in critic if isinstance(layer, nn.Conv2d)]
    assert len(convolutions) == math.log2(side) - 2
    widths = [layer.out_channels for layer in convolutions]
    assert widths == [16, 32, 64, 128, 128, 128][: len(convolutions)]
    ups = [layer for layer in generator if isinstance(layer, nn.ConvTranspose2d)]
    assert [layer.in_channels for layer in ups] == widths[::-1]
    assert critic[-1].in_features == widths[-1] * 4 * 4
    assert not any(isinstance(layer, nn.BatchNorm2d) for layer in critic)

    samples = generator(torch.randn(16, 128)).detach().requires_grad_()
    assert samples.shape == (16, channels, side, side)
    assert 0.3 < samples.std() < 0.8
    (gradient,) = torch.autograd.grad(critic(samples).sum(), samples)
    # Layer defaults would leave 0.04 at 16 pixels and 0.002 at 256.
    assert 0.5 < gradient.flatten(1).norm(dim=1).mean() < 2


@pytest.mark.parametrize("side", [32, 64])
def test_a_dcgan_is_the_named_model_of_its_size(side):
    name, width = {32: ("cifar-dcgan", 128), 64: ("dcgan64", 64)}[side]
    with torch.device("meta"):
        named = models.build(name, (3, side, side))
        sized = models.build("dcgan", (3, side, side), width=width)
    assert [str(network) for network in named] == [str(network) for network in sized]


@pytest.mark.parametrize(("name", "shape"), [("mlp", (2, 8, 8)), ("article", (2, 8, 8)), ("dcgan", (2, 16, 16))])
def test_fields_that_are_no_images_are_not_bounded(name, shape):
    generator, _ = models.build(name, shape, width=4, bounded=False)
    with torch.no_grad():
        for parameter in generator.parameters():
            parameter.mul_(3)
        assert generator(torch.randn(20, generator.latent_dim)).abs().max() > 1
    bounded, _ = models.build(name, shape, width=4)
    assert generator.state_dict().keys() == bounded.state_dict().keys()


def test_latent_dimension_and_width_can_be_chosen():
    generator, critic = models.build("mnist-dcgan", (1, 28, 28), latent_dim=5, width=3)
    assert generator.latent_dim == 5
    assert generator(torch.randn(2, 5)).shape == (2, 1, 28, 28)
    assert critic[0].out_channels == 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "resnet"}, "model must be one of toy-mlp, .*, got 'resnet'"),
        ({"sample_shape": (3, 32, 33)}, r"'cifar-dcgan' makes images \[C, 32, 32\], not .* \[3, 32, 33\]"),
        ({"sample_shape": ()}, "sample_shape must be positive integers"),
        ({"sample_shape": (3, 0, 32)}, "sample_shape must be positive integers"),
        ({"latent_dim": 0}, "latent_dim must be at least 1, got 0"),
        ({"width": -1}, "width must be at least 1, got -1"),
        ({"init": "xavier"}, "init must be one of pytorch, he, dcgan, orthogonal, got 'xavier'"),
    ],
)
def test_what_cannot_be_built_is_refused_by_name(options, message):
    arguments = {"name": "cifar-dcgan", "sample_shape": (3, 32, 32), "width": 2} | options
    with pytest.raises(InputError, match=message):
        models.build(**arguments)


@pytest.fixture
def own_module(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "own_networks.py").write_text(
        "import torch\n"
        "def pair(shape):\n"
        "    generator = torch.nn.Linear(4, shape[0])\n"
        "    generator.latent_dim = 4\n"
        "    return generator, torch.nn.Linear(shape[0], 1)\n"
        "def no_latent_dim(shape):\n"
        "    return torch.nn.Linear(4, 2), torch.nn.Linear(2, 1)\n"
        "def single(shape):\n"
        "    return torch.nn.Linear(4, 2)\n"
        "def faulty(shape):\n"
        "    raise RuntimeError('inside the function')\n"
    )
    (tmp_path / "own_broken.py").write_text("import no_such_dependency\n")
    yield
    for name in ("own_networks", "own_broken"):
        sys.modules.pop(name, None)


@pytest.mark.usefixtures("own_module")
def test_networks_of_ones_own_are_built_from_the_current_directory():
    generator, critic = models.build("own_networks:pair", (2,), init="dcgan")
    assert generator.latent_dim == 4
    assert critic(generator(torch.randn(3, 4))).shape == (3, 1)
    assert generator.bias.abs().max() == 0  # the initialisation applies to them too


@pytest.mark.usefixtures("own_module")
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("no_such_module:pair", "cannot import 'no_such_module': No module named 'no_such_module'"),
        ("own_broken:pair", "cannot import 'own_broken': No module named 'no_such_dependency'"),
        (":pair", "cannot import ''"),
        ("own_networks:nothing", "module 'own_networks' has no function 'nothing'"),
        ("own_networks:", "module 'own_networks' has no function ''"),
        ("own_networks:single", "must return a pair of nn.Modules .* got Linear"),
        ("own_networks:no_latent_dim", "give latent_dim, or the generator an integer attribute of that name"),
    ],
)
def test_wrong_networks_of_ones_own_are_refused_by_name(name, message):
    with pytest.raises(InputError, match=message):
        models.build(name, (2,))


@pytest.mark.usefixtures("own_module")
def test_an_error_inside_ones_own_function_is_not_hidden():
    with pytest.raises(RuntimeError, match="inside the function"):
        models.build("own_networks:faulty", (2,))


@pytest.mark.usefixtures("own_module")
def test_latent_dimension_can_be_given_for_a_generator_that_does_not_say_it():
    assert models.build("own_networks:no_latent_dim", (2,), latent_dim=4)[0].latent_dim == 4
    assert models.build("own_networks:pair", (2,), latent_dim=4)[0].latent_dim == 4


@pytest.mark.usefixtures("own_module")
@pytest.mark.parametrize(
    ("option", "message"), [("latent_dim", "latent_dim is 3, but .* has 4"), ("width", "width is for built-in")]
)
def test_sizes_are_not_silently_ignored_for_networks_of_ones_own(option, message):
    with pytest.raises(InputError, match=message):
        models.build("own_networks:pair", (2,), **{option: 3})


def weighted_layers(scheme: str) -> nn.ModuleList:
    torch.manual_seed(0)
    layers = nn.ModuleList(
        [
            nn.Linear(300, 200),
            nn.Conv2d(60, 50, 5, stride=2),
            nn.Conv2d(64, 128, 3, groups=2),
            nn.ConvTranspose2d(80, 40, 5, stride=2),
            nn.BatchNorm2d(10_000),
            nn.GroupNorm(1, 30),
        ]
    )
    weights.initialise(layers, scheme)
    return layers


def assert_normal(weight: Tensor, mean: float, std: float) -> None:
    """Five standard errors: fails once in two million draws, and the seed is fixed."""
    n = weight.numel()
    assert abs(weight.mean().item() - mean) < 5 * std / math.sqrt(n)
    assert abs(weight.std().item() / std - 1) < 5 / math.sqrt(2 * n)
    kurtosis = ((weight - mean) / std).pow(4).mean().item()
    assert abs(kurtosis - 3) < 5 * math.sqrt(96 / n)  # var(x^4) = 96 for a standard normal; 1.8 would be uniform


def test_he_scales_by_the_inputs_that_reach_one_output():
    layers = weighted_layers("he")
    # A stride-2 transposed convolution feeds each output from a quarter of its 25 taps.
    for layer, fan_in in zip(layers, [300, 60 * 25, 32 * 9, 80 * 25 / 4]):
        assert_normal(layer.weight, 0, math.sqrt(2 / fan_in))


def test_he_keeps_the_variance_of_relu_features_through_a_transposed_convolution():
    torch.manual_seed(0)
    layer = nn.ConvTranspose2d(200, 200, 5, stride=2, padding=2, output_padding=1)
    weights.initialise(layer, "he")
    x = torch.randn(8, 200, 12, 12)
    inside = layer(x.relu())[..., 4:-4, 4:-4]
    assert inside.var().item() == pytest.approx(1, rel=0.05)


def test_dcgan_draws_weights_and_batch_norm_scales_with_deviation_002():
    layers = weighted_layers("dcgan")
    for layer in layers[:4]:
        assert_normal(layer.weight, 0, 0.02)
    assert_normal(layers[4].weight, 1, 0.02)


def test_orthogonal_weights_are_orthonormal():
    for layer in weighted_layers("orthogonal")[:4]:
        matrix = layer.weight.detach().double().flatten(1)
        if matrix.shape[0] > matrix.shape[1]:
            matrix = matrix.T
        # float32 QR: a few rounding errors (6e-8) in each entry
        torch.testing.assert_close(matrix @ matrix.T, torch.eye(len(matrix), dtype=torch.float64), rtol=0, atol=1e-5)


@pytest.mark.parametrize("scheme", ["he", "dcgan", "orthogonal"])
def test_initialisation_zeroes_biases_and_leaves_other_norms_alone(scheme):
    layers = weighted_layers(scheme)
    assert all(layer.bias.abs().max() == 0 for layer in layers)
    assert (layers[5].weight == 1).all()
    if scheme != "dcgan":
        assert (layers[4].weight == 1).all()


def test_pytorch_initialisation_changes_nothing():
    torch.manual_seed(0)
    layer = nn.Linear(3, 5)
    before = [p.clone() for p in layer.parameters()]
    weights.initialise(layer, "pytorch")
    assert all(torch.equal(p, q) for p, q in zip(layer.parameters(), before))


@pytest.mark.parametrize("scheme", weights.INITIALISATIONS)
def test_the_seed_decides_the_networks(scheme):
    networks = [small("cifar-dcgan", init=scheme) for _ in range(2)]
    for first, second in zip(*networks):
        assert all(torch.equal(p, q) for p, q in zip(first.parameters(), second.parameters()))


@pytest.mark.parametrize("name", ["mnist-dcgan", "cifar-resnet"])
def test_spectral_norm_bounds_every_weight_by_one(name):
    _, critic = small(name, init="he")
    assert weights.spectral_norm(critic) is critic
    for _ in range(100):  # power iteration: one step per forward in training mode
        critic(torch.randn(1, *SHAPES[name]))
    weighted = [m for m in critic.modules() if isinstance(m, nn.Linear | nn.Conv2d)]
    for layer in weighted:
        largest = torch.linalg.matrix_norm(layer.weight.detach().flatten(1), ord=2).item()
        assert largest == pytest.approx(1, rel=0.05)


def test_spectral_norm_twice_is_spectral_norm_once():
    _, critic = small("mnist-dcgan")
    weights.spectral_norm(critic)
    names = list(critic.state_dict())
    assert list(weights.spectral_norm(critic).state_dict()) == names


def test_initialising_a_parametrised_weight_is_refused_rather_than_ignored():
    _, critic = small("mnist-dcgan")
    with pytest.raises(ValueError, match=r"module\.0\.weight is parametrised"):
        weights.initialise(weights.spectral_norm(critic), "he")
