"""ClippedRMSprop: torch.optim.RMSprop and then the clip, in one pass, with RMSprop's state."""

import copy
import itertools
import json
import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from wgan_fast import build_info, clip_weights_, ops, optim
from wgan_fast.optim import ClippedRMSprop

DEVICES = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
SIZES = [(), (1,), (3,), (0,), (63,), (100, 3), (1000,), (2, 3, 5, 7)]
OPTIONS = [
    {},
    {"momentum": 0.9},
    {"centered": True},
    {"weight_decay": 0.1},
    {"maximize": True, "eps": 1e-3},
    {"alpha": 0.3, "centered": True, "momentum": 0.5, "weight_decay": 0.01, "maximize": True},
]


@pytest.fixture(params=["operator", "foreach"])
def implementation(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What the dispatcher runs here, and what it runs where the extension has no kernel."""
    if request.param == "foreach":
        monkeypatch.setattr(optim, "_clipped_rmsprop_", ops.clipped_rmsprop_)


def parameters(dtype: torch.dtype = torch.float32, device: str = "cpu", sizes: list = SIZES) -> list[Tensor]:
    return [(torch.randn(size) * 0.02).to(device, dtype).requires_grad_() for size in sizes]


def twins(params: list[Tensor], dtype: torch.dtype | None = None) -> list[Tensor]:
    return [param.detach().to(dtype or param.dtype, copy=True).requires_grad_() for param in params]


def train(params: list[Tensor], optimizer: torch.optim.Optimizer, steps: int, clip: float | None = None) -> None:
    """Steps on the same gradients for every dtype; ``clip`` is for an optimizer that does not."""
    generator = torch.Generator().manual_seed(7)
    for _ in range(steps):
        for param in params:
            # Rounded to 8 bits, so that every dtype holds the same gradient.
            noise = torch.randn(param.shape, generator=generator).bfloat16()
            param.grad = noise.to(param.device, param.dtype)
        optimizer.step()
        if clip is not None:
            with torch.no_grad():
                for param in params:
                    param.clamp_(-clip, clip)


def error(actual: list[Tensor], truth: list[Tensor]) -> Tensor:
    return torch.cat([(a.detach().double() - t.detach()).flatten() for a, t in zip(actual, truth)]).norm()


@pytest.mark.usefixtures("implementation")
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_steps_are_those_of_rmsprop_and_a_clamp(dtype: torch.dtype, options: dict, device: str) -> None:
    # A bound that every dtype holds, and a rate at which some weights reach it and others do not.
    clip, lr = 2.0**-5, 2.0**-9
    ours = [param.bfloat16().to(dtype).requires_grad_() for param in map(Tensor.detach, parameters(device=device))]
    theirs, truth = twins(ours), twins(ours, torch.float64)
    names = ["square_avg", *["grad_avg"] * ("centered" in options), *["momentum_buffer"] * ("momentum" in options)]
    optimizer = ClippedRMSprop(ours, lr=lr, clip=clip, **options)
    reference = torch.optim.RMSprop(theirs, lr=lr, foreach=True, **options)
    exact = torch.optim.RMSprop(truth, lr=lr, foreach=False, **options)
    train(ours, optimizer, 25)
    train(theirs, reference, 25, clip)
    train(truth, exact, 25, clip)
    clipped = sum((param.abs() == clip).sum() for param in ours)
    assert 0 < clipped < sum(param.numel() for param in ours)
    pairs = [(ours, theirs, truth)]
    for name in names:
        states = [(optimizer, ours), (reference, theirs), (exact, truth)]
        pairs.append(tuple([owner.state[param][name] for param in params] for owner, params in states))
    for a, b, t in pairs:
        size = torch.cat([value.detach().flatten() for value in t]).norm()
        if dtype == torch.float64:
            # The truth itself is rounded: 25 steps of some ten roundings each.
            assert error(a, t) <= 250 * torch.finfo(dtype).eps * size
        else:
            assert error(a, t) <= 2 * error(b, t) + torch.finfo(dtype).eps * size
    assert all(optimizer.state[param]["step"] == 25 for param in ours)


@pytest.mark.usefixtures("implementation")
def test_each_group_has_its_own_options() -> None:
    params = parameters()
    expected = twins(params)
    options = [{"lr": 1e-3, "clip": 0.02}, {"momentum": 0.9, "clip": (-0.01, 0.03)}, {"centered": True}]
    groups = [{"params": params[at::3], **group} for at, group in enumerate(options)]
    train(params, ClippedRMSprop(groups, lr=1e-2, clip=0.015), 5)
    for group in options:
        group.pop("clip", None)
    reference = torch.optim.RMSprop([{"params": expected[at::3], **group} for at, group in enumerate(options)], lr=1e-2)
    clips = [(-0.02, 0.02), (-0.01, 0.03), (-0.015, 0.015)]
    ranges = [clips[at % 3] for at in range(len(expected))]
    generator = torch.Generator().manual_seed(7)
    for _ in range(5):
        for param in expected:
            param.grad = torch.randn(param.shape, generator=generator).bfloat16().float()
        reference.step()
        with torch.no_grad():
            for param, (low, high) in zip(expected, ranges):
                param.clamp_(low, high)
    for param, reference_param in zip(params, expected):
        torch.testing.assert_close(param, reference_param)


@pytest.mark.usefixtures("implementation")
def test_a_parameter_without_a_gradient_is_clipped_and_nothing_else() -> None:
    frozen, trained = torch.tensor([-1.0, 0.005, math.nan, 1.0]), torch.ones(3)
    trained.grad = torch.ones(3)
    optimizer = ClippedRMSprop([frozen.requires_grad_(), trained.requires_grad_()], weight_decay=0.1)
    optimizer.step()
    torch.testing.assert_close(frozen.detach(), torch.tensor([-0.01, 0.005, math.nan, 0.01]), equal_nan=True)
    assert frozen not in optimizer.state
    assert trained.tolist() == [pytest.approx(0.01)] * 3


LAYOUTS = {
    "transposed": lambda values: values.t().contiguous().t(),
    "channels last": lambda values: values.reshape(4, 5, 3, 7).contiguous(memory_format=torch.channels_last),
    "every second row": lambda values: values.repeat_interleave(2, 0)[::2],
    "an odd start": lambda values: torch.cat([values.new_zeros(1), values.flatten()])[1:].view(values.shape),
    "contiguous": lambda values: values.clone(),
}


@pytest.mark.usefixtures("implementation")
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("options", [OPTIONS[0], OPTIONS[-1]])
@pytest.mark.parametrize(("layout", "grad_layout"), list(itertools.product(LAYOUTS, LAYOUTS)))
def test_any_layout_of_parameter_and_gradient_gives_the_same_values(
    layout: str, grad_layout: str, options: dict, device: str
) -> None:
    values, grads = torch.randn(20, 21, device=device) * 0.02, torch.randn(3, 20, 21, device=device)
    param = LAYOUTS[layout](values).requires_grad_()
    expected = values.reshape(param.shape).clone().requires_grad_()
    optimizer, plain = (ClippedRMSprop([tensor], lr=1e-3, **options) for tensor in (param, expected))
    for grad in grads:
        param.grad = LAYOUTS[grad_layout](grad).reshape(param.shape)
        expected.grad = grad.reshape(param.shape)
        optimizer.step()
        plain.step()
    # The layout decides which elements are in whole vectors, and PyTorch's own rounding depends on that.
    torch.testing.assert_close(param, expected, rtol=1e-5, atol=1e-9)


def test_what_lies_between_a_parameters_elements_is_left_alone() -> None:
    base = torch.full((5, 6), 7.0)
    param = base[:, ::2].requires_grad_()
    param.grad = torch.ones(1).expand(5, 3)
    ClippedRMSprop([param]).step()
    assert (base[:, 1::2] == 7).all()
    assert (base[:, ::2] == 0.01).all()


@pytest.mark.usefixtures("implementation")
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_and_infinity_go_where_rmsprop_and_clamp_send_them(dtype: torch.dtype, device: str) -> None:
    special = [math.nan, math.inf, -math.inf, 0.0, -0.0, 1.0, -0.5]
    pairs = torch.tensor(list(itertools.product(special, special)), dtype=dtype, device=device)
    for weight_decay in (0.0, 0.1):
        ours = pairs[:, 0].clone().requires_grad_()
        (theirs,) = twins([ours], torch.float64)
        ours.grad, theirs.grad = pairs[:, 1].clone(), pairs[:, 1].double()
        ClippedRMSprop([ours], weight_decay=weight_decay).step()
        torch.optim.RMSprop([theirs], lr=5e-5, weight_decay=weight_decay).step()
        if dtype == torch.float16:
            # Its smallest number is 6e-8: PyTorch's own path loses eps, and 0 / 0 is NaN.
            zero = pairs[:, 1] == 0
            assert ours[~zero].isnan().equal(theirs[~zero].isnan())
        else:
            assert ours.isnan().equal(theirs.isnan())
        number = ~ours.isnan()
        expected = theirs.detach().clamp(-0.01, 0.01)[number]
        torch.testing.assert_close(ours.detach()[number].double(), expected, rtol=0.01, atol=1e-4)


def test_either_optimizer_goes_on_from_the_others_state() -> None:
    options = {"lr": 1e-3, "momentum": 0.9, "centered": True}
    ours = parameters()
    optimizer = ClippedRMSprop(ours, clip=0.015, **options)
    train(ours, optimizer, 3)

    theirs = twins(ours)
    reference = torch.optim.RMSprop(theirs, lr=0.5)
    reference.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    back = twins(ours)
    returned = ClippedRMSprop(back, lr=0.5, clip=0.015)
    returned.load_state_dict(copy.deepcopy(reference.state_dict()))
    train(ours, optimizer, 3)
    train(theirs, reference, 3, 0.015)
    train(back, returned, 3)
    for a, b, c in zip(ours, theirs, back):
        assert torch.equal(a, c)
        torch.testing.assert_close(a, b)
    assert reference.state_dict()["state"].keys() == optimizer.state_dict()["state"].keys()


def test_a_group_from_rmsprop_keeps_the_clip_it_had() -> None:
    state = torch.optim.RMSprop([torch.ones(1), torch.ones(1)]).state_dict()
    optimizer = ClippedRMSprop([{"params": [torch.ones(1), torch.ones(1)], "clip": (-1.0, 2.0)}])
    optimizer.load_state_dict(state)
    assert optimizer.param_groups[0]["clip"] == (-1.0, 2.0)
    assert copy.deepcopy(optimizer).param_groups[0]["clip"] == (-1.0, 2.0)


def test_a_clip_that_went_through_json_is_a_pair_again() -> None:
    optimizer = ClippedRMSprop([torch.ones(1)], clip=(-1.0, 2.0))
    loaded = ClippedRMSprop([torch.ones(1)])
    loaded.load_state_dict(json.loads(json.dumps(optimizer.state_dict())))
    assert loaded.param_groups[0]["clip"] == (-1.0, 2.0)


def test_a_checkpoint_without_pickle_resumes_bit_for_bit(tmp_path: Path) -> None:
    checkpoint = pytest.importorskip("wgan_fast.training.checkpoint", exc_type=ImportError)
    ours = parameters()
    optimizer = ClippedRMSprop(ours, clip=(-0.01, 0.02))
    train(ours, optimizer, 3)
    state = {"critic": ours, "optimizer": checkpoint.optimizer_state(optimizer)}
    checkpoint.save_checkpoint(tmp_path, 3, state, keep=1)

    read = checkpoint.load_checkpoint(tmp_path).state
    resumed = [weight.requires_grad_() for weight in read["critic"]]
    again = ClippedRMSprop(resumed, clip=(-0.01, 0.02))
    checkpoint.load_optimizer(again, read["optimizer"])
    train(ours, optimizer, 2)
    train(resumed, again, 2)
    assert all(torch.equal(a, b) for a, b in zip(ours, resumed))


@pytest.mark.usefixtures("implementation")
@pytest.mark.parametrize("device", DEVICES)
def test_a_learning_rate_may_be_a_tensor_and_follow_a_schedule(device: str) -> None:
    ours, expected = (parameters(device=device, sizes=[(63,)]) for _ in range(2))
    with torch.no_grad():
        expected[0].copy_(ours[0])
    optimizer = ClippedRMSprop(ours, lr=torch.tensor(1e-2, device=device), clip=1.0)
    reference = ClippedRMSprop(expected, lr=1e-2, clip=1.0)
    schedules = [torch.optim.lr_scheduler.StepLR(owner, 2, gamma=0.1) for owner in (optimizer, reference)]
    for _ in range(5):
        train(ours, optimizer, 1)
        train(expected, reference, 1)
        for schedule in schedules:
            schedule.step()
    assert float(reference.param_groups[0]["lr"]) == pytest.approx(1e-4)
    torch.testing.assert_close(ours, expected)


def test_a_closure_is_evaluated_with_gradients_and_its_loss_returned() -> None:
    critic = nn.Linear(3, 1)
    optimizer = ClippedRMSprop(critic.parameters())

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = critic(torch.ones(5, 3)).sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).requires_grad
    assert critic.weight.grad.tolist() == [[5, 5, 5]]
    assert critic.weight.abs().max() <= 0.01


@pytest.mark.usefixtures("implementation")
def test_autograd_sees_that_parameters_and_state_were_modified() -> None:
    weight = torch.randn(5, requires_grad=True)
    loss = weight.square().sum()
    loss.backward(retain_graph=True)
    optimizer = ClippedRMSprop([weight])
    optimizer.step()
    square_avg = optimizer.state[weight]["square_avg"]
    versions = weight._version, square_avg._version, weight.grad._version
    optimizer.step()
    assert weight._version > versions[0]
    assert square_avg._version > versions[1]
    assert weight.grad._version == versions[2]
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_threads_share_the_parameters_without_missing_an_element(threads: int) -> None:
    before = torch.get_num_threads()
    params = [torch.zeros(size, requires_grad=True) for size in (1, 65_537, 3, 0, 131_071, 32_768, 5)]
    for param in params:
        param.grad = torch.ones_like(param)
    torch.set_num_threads(threads)
    try:
        ClippedRMSprop(params, lr=1.0, alpha=0.75, eps=0.5, clip=2.0).step()
    finally:
        torch.set_num_threads(before)
    # sqrt(0.25 * 1) + 0.5 = 1
    assert all((param == -1).all() for param in params)


@pytest.mark.parametrize(
    ("options", "error_type", "match"),
    [
        ({"clip": 0.0}, ValueError, "clip must be greater than 0, got 0.0"),
        ({"clip": math.nan}, ValueError, "clip must be greater than 0, got nan"),
        ({"clip": (1.0, 0.0)}, ValueError, r"clip must be a pair \(low, high\) with low <= high"),
        ({"clip": "0.01"}, TypeError, "clip must be a number or a pair"),
        ({"lr": -1.0}, ValueError, "learning rate"),
        ({"alpha": -0.1}, ValueError, "alpha"),
    ],
)
def test_an_option_out_of_range_is_refused(options: dict, error_type: type, match: str) -> None:
    with pytest.raises(error_type, match=match):
        ClippedRMSprop([torch.ones(3)], **options)
    optimizer = ClippedRMSprop([torch.ones(3)])
    if "clip" in options:
        with pytest.raises(error_type, match=match):
            optimizer.add_param_group({"params": [torch.ones(2)], **options})
        assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize("bad", [torch.ones(3, dtype=torch.complex64), torch.ones(3).to(torch.float8_e5m2)])
def test_a_parameter_of_another_dtype_is_refused(bad: Tensor) -> None:
    with pytest.raises(TypeError, match=rf"params\[1\] of group 0 must be a dense .*got {bad.dtype}"):
        ClippedRMSprop([torch.ones(3), bad])


def test_a_refused_gradient_leaves_every_group_untouched() -> None:
    good, bad = torch.ones(3, requires_grad=True), torch.ones(3, 3, requires_grad=True)
    good.grad, bad.grad = torch.ones(3), torch.eye(3).to_sparse()
    optimizer = ClippedRMSprop([{"params": [good]}, {"params": [bad]}])
    with pytest.raises(TypeError, match=r"gradient of params\[0\] of group 1 .*layout torch.sparse_coo"):
        optimizer.step()
    assert good.tolist() == [1, 1, 1]
    assert not optimizer.state


def test_the_operator_refuses_what_it_cannot_write() -> None:
    weight, state = torch.ones(3), torch.zeros(3)

    def call(params: list, grads: list, states: list, high: float = 0.5) -> None:
        step = torch.ops.wgan_fast.clipped_rmsprop_
        step(params, grads, states, [], [], None, 0.1, 0.9, 0.1, 0.0, 0.0, False, -0.5, high)

    with pytest.raises((ValueError, RuntimeError), match="low must be at most high"):
        call([weight], [weight], [state], high=math.nan)
    if build_info()["extension"]["active"]:
        for grads, states in [
            ([torch.ones(4)], [state]),
            ([torch.ones(3).double()], [state]),
            ([torch.ones(3)], [torch.zeros(1).expand(3)]),
            ([], []),
            ([torch.ones(3), torch.ones(3)], [state]),
        ]:
            with pytest.raises(RuntimeError, match="expected"):
                call([weight], grads, states)
    assert weight.tolist() == [1, 1, 1]
    assert state.tolist() == [0, 0, 0]


def samples(device: str) -> Iterator[tuple]:
    for options, dtype in itertools.product(OPTIONS, [torch.float32, torch.bfloat16]):
        params = [torch.randn(63, 5, device=device, dtype=dtype).requires_grad_(), torch.randn(3, device=device)]
        params.append(torch.randn(2, 3, 4, 5, device=device).to(memory_format=torch.channels_last))
        grads = [torch.randn(param.shape, device=device, dtype=param.dtype) for param in params]
        states = [[torch.rand_like(param).detach() for param in params] for _ in range(3)]
        grad_avgs = states[1] if "centered" in options else []
        buffers = states[2] if "momentum" in options else []
        numbers = (options.get(name, 0.1) for name in ("lr", "alpha", "eps", "weight_decay", "momentum"))
        maximize = options.get("maximize", False)
        yield params, grads, states[0], grad_avgs, buffers, None, *numbers, maximize, -0.5, 0.5


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_the_operator_is_registered_correctly(device: str) -> None:
    for sample in samples(device):
        torch.library.opcheck(torch.ops.wgan_fast.clipped_rmsprop_.default, sample)


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_it_compiles_into_one_graph(backend: str) -> None:
    def step(param: Tensor, grad: Tensor, square_avg: Tensor) -> Tensor:
        torch.ops.wgan_fast.clipped_rmsprop_(
            [param], [grad], [square_avg], [], [], None, 0.1, 0.9, 0.1, 0.0, 0.0, False, -0.5, 0.5
        )
        return param.sum() + square_avg.sum()

    tensors = [torch.randn(63), torch.randn(63), torch.rand(63)]
    eager, compiled = [tensor.clone() for tensor in tensors], [tensor.clone() for tensor in tensors]
    expected = step(*eager)
    torch.testing.assert_close(torch.compile(step, fullgraph=True, backend=backend)(*compiled), expected)
    assert all(torch.equal(a, b) for a, b in zip(eager, compiled))


def test_a_compiled_step_is_the_eager_step() -> None:
    eager = parameters()
    compiled = twins(eager)
    train(eager, ClippedRMSprop(eager, lr=1e-3), 3)
    optimizer = ClippedRMSprop(compiled, lr=1e-3)
    step = torch.compile(optimizer.step, backend="eager")
    generator = torch.Generator().manual_seed(7)
    for _ in range(3):
        for param in compiled:
            param.grad = torch.randn(param.shape, generator=generator).bfloat16().float()
        step()
    assert all(torch.equal(a, b) for a, b in zip(eager, compiled))


gpu_kernel = pytest.mark.skipif(not build_info()["cuda"]["active"], reason="no GPU, or no CUDA in the extension")


@gpu_kernel
def test_on_a_gpu_the_parameters_of_a_dtype_are_one_launch() -> None:
    params = parameters(device="cuda", sizes=[(0,), (1,), (63,), (70_001,), (512, 256, 4, 4)])
    optimizer = ClippedRMSprop(params, capturable=True)
    train(params, optimizer, 1)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        optimizer.step()
        torch.cuda.synchronize()
    events = [event.name for event in profile.events() if event.device_type == torch.profiler.DeviceType.CUDA]
    assert len([name for name in events if "clipped_rmsprop" in name]) == 1, events
    assert len(events) == 2, "the other counts the steps"


@gpu_kernel
def test_a_cuda_graph_follows_a_learning_rate_on_the_gpu() -> None:
    weight = torch.zeros(1003, device="cuda", requires_grad=True)
    weight.grad = torch.ones_like(weight)
    rate = torch.tensor(1.0, device="cuda")
    optimizer = ClippedRMSprop([weight], lr=rate, alpha=1.0, eps=0.5, clip=100.0, capturable=True)
    optimizer.step()  # makes the state
    weight.detach().zero_()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        optimizer.step()
    for value in (1.0, 0.25):
        rate.fill_(value)
        before = weight.detach().clone()
        graph.replay()
        # With alpha = 1 the average stays 0, so a step is lr / eps.
        assert torch.equal(weight, before - value / 0.5)
    assert optimizer.state[weight]["step"] == 3


@gpu_kernel
def test_a_cuda_graph_without_capturable_is_refused() -> None:
    weight = torch.zeros(3, device="cuda", requires_grad=True)
    weight.grad = torch.ones_like(weight)
    optimizer = ClippedRMSprop([weight])
    optimizer.step()
    graph = torch.cuda.CUDAGraph()
    with pytest.raises(RuntimeError, match="capturable must be True"), torch.cuda.graph(graph):
        optimizer.step()


@pytest.mark.parametrize("device", DEVICES)
def test_more_tensors_than_a_launch_takes_are_all_stepped(device: str) -> None:
    params = [torch.zeros(7, device=device, requires_grad=True) for _ in range(150)]
    for param in params:
        param.grad = torch.ones_like(param)
    ClippedRMSprop(params, lr=1.0, alpha=0.75, eps=0.5, clip=2.0).step()
    assert all((param == -1).all() for param in params)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_parameters_may_lie_on_several_devices_cuda_included() -> None:
    params = [torch.zeros(5, device=device, requires_grad=True) for device in ("cpu", "cuda", "cpu")]
    for param in params:
        param.grad = torch.ones_like(param)
    ClippedRMSprop(params, lr=1.0, alpha=0.75, eps=0.5, clip=2.0).step()
    assert [param.tolist() for param in params] == [[-1.0] * 5] * 3


def test_the_fused_step_is_rmsprop_then_clip_weights() -> None:
    critic = nn.Sequential(nn.Conv2d(3, 5, 3), nn.LeakyReLU(0.2), nn.Flatten(), nn.Linear(5 * 36, 1))
    other = copy.deepcopy(critic)
    optimizer, reference = ClippedRMSprop(critic.parameters()), torch.optim.RMSprop(other.parameters(), lr=5e-5)
    for _ in range(5):
        x = torch.randn(7, 3, 8, 8)
        for network, owner in ((critic, optimizer), (other, reference)):
            owner.zero_grad()
            network(x).mean().backward()
            owner.step()
        clip_weights_(other)
    torch.testing.assert_close(list(critic.parameters()), list(other.parameters()))
