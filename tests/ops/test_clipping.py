"""Weight clipping: torch.clamp's values on any tensor, in place, seen by autograd, nothing touched on an error."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from wgan_fast import build_info, clip_weights_, ops

DEVICES = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
BITS = {torch.float64: torch.int64, torch.float32: torch.int32, torch.float16: torch.int16, torch.bfloat16: torch.int16}
# What the dispatcher runs here, and what it runs where the extension is missing or has no kernel for the device.
IMPLEMENTATIONS = [
    pytest.param(torch.ops.wgan_fast.clip_weights_.default, id="operator"),
    pytest.param(ops.clip_weights_, id="foreach"),
]


def clamped(tensor: Tensor, low: float, high: float) -> Tensor:
    """torch.clamp in float64 with the bounds rounded to the tensor's dtype."""
    low, high = torch.tensor([low, high], dtype=torch.float64).to(tensor.dtype).tolist()
    return tensor.double().clamp(low, high).to(tensor.dtype)


def assert_same_bits(actual: Tensor, expected: Tensor) -> None:
    bits = BITS[actual.dtype]
    assert actual.shape == expected.shape
    assert torch.equal(actual.contiguous().view(bits), expected.contiguous().view(bits))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_values_are_those_of_torch_clamp(implementation: Callable, dtype: torch.dtype, device: str) -> None:
    # Around one vector, one block and one thread's share, with a list longer than one launch takes.
    sizes = [0, 1, 3, 63, 100, 1000, 16 * 1024 + 5, 100_003, *[7] * 150]
    tensors = [(torch.randn(size) * 0.02).to(device, dtype) for size in sizes]
    expected = [clamped(tensor, -0.01, 0.013) for tensor in tensors]
    implementation(tensors, -0.01, 0.013)
    for tensor, reference in zip(tensors, expected):
        assert_same_bits(tensor, reference)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    ("low", "high"), [(-0.01, 0.01), (0.5, 2.0), (-3.0, -0.1), (0.0, 1.0), (-1.0, -0.0), (-math.inf, 0.1), (-1e9, 1e9)]
)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_every_16_bit_float_is_clipped_as_its_float64_value(
    implementation: Callable, low: float, high: float, dtype: torch.dtype, device: str
) -> None:
    every = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype).to(device)
    number = ~every.isnan()
    actual = every.clone()
    implementation([actual], low, high)
    # As numbers, because the sign of a zero at a bound of zero is nobody's promise.
    assert torch.equal(actual[number].double(), clamped(every, low, high)[number].double())
    inside = number & (every > low) & (every < high)
    assert_same_bits(actual[inside], every[inside])
    assert actual[~number].isnan().all()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_nan_stays_and_infinity_moves_to_the_bound(implementation: Callable, dtype: torch.dtype, device: str) -> None:
    # 19 values: some in whole vectors, some in the rest.
    special = [math.nan, math.inf, -math.inf, 0.0, -0.0, -math.nan, 1e-40, 1.0]
    tensor = torch.tensor([*special, *special, math.nan, 5.0, -5.0], dtype=dtype, device=device)
    expected = clamped(tensor, -0.5, 2.0)
    implementation([tensor], -0.5, 2.0)
    assert torch.equal(tensor.isnan(), expected.isnan())
    number = ~expected.isnan()
    assert_same_bits(tensor[number], expected[number])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("dtype", "pattern"), [(torch.float64, 0x7FF0DEAD00000001), (torch.float32, 0x7F80DEAD)])
def test_a_nan_keeps_its_payload(dtype: torch.dtype, pattern: int, device: str) -> None:
    before = torch.full((37,), pattern, dtype=BITS[dtype], device=device)
    after = before.clone()
    clip_weights_(after.view(dtype), 0.01)
    assert torch.equal(before, after)


VIEWS = {
    "transposed": lambda base: base.t(),
    "channels last": lambda base: base[:60, :98].reshape(6, 10, 14, 7).contiguous(memory_format=torch.channels_last),
    "every second row": lambda base: base[::2],
    "every third column": lambda base: base[:, 1::3],
    "a block": lambda base: base[3:20, 5:8],
    "an odd start": lambda base: base.flatten()[1:],
    "a scalar": lambda base: base[2, 3],
    "one element of an expanded dimension": lambda base: base[:1].expand(1, 100),
    "empty": lambda base: base[:0],
    "empty and expanded": lambda base: base[:1, :0].expand(5, 0),
    "complex parts": lambda base: torch.view_as_complex(base.float().view(-1, 2)).imag,
}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_view_is_clipped_and_nothing_beside_it(implementation: Callable, view: str, device: str) -> None:
    base = (torch.randn(63, 100) * 0.02).to(device)
    target = VIEWS[view](base)
    storage = target.untyped_storage()
    whole = torch.tensor([], dtype=target.dtype, device=device).set_(storage)
    expected = torch.tensor([], dtype=target.dtype, device=device).set_(storage.clone())
    expected.as_strided(target.shape, target.stride(), target.storage_offset()).clamp_(-0.01, 0.01)
    implementation([target], -0.01, 0.01)
    assert torch.equal(whole, expected)


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_threads_share_a_list_without_missing_an_element(threads: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        tensors = [torch.full((size,), 7.0) for size in (1, 65_537, 3, 0, 131_071, 32_768, 5)]
        clip_weights_(tensors, 0.01)
    finally:
        torch.set_num_threads(before)
    assert all((tensor == 0.01).all() for tensor in tensors)


def test_one_call_takes_mixed_dtypes_and_repeated_tensors() -> None:
    tensors = [torch.full((33,), 7.0, dtype=dtype) for dtype in DTYPES]
    clip_weights_([*tensors, *tensors], (-2.0, 3.0))
    assert all((tensor == 3).all() for tensor in tensors)


def test_module_tensor_and_iterable_are_all_accepted_and_returned() -> None:
    critic = nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.Linear(7, 1))
    statistics = critic[1].running_var.clone()
    assert clip_weights_(critic) is critic
    assert all(parameter.abs().max() <= 0.01 for parameter in critic.parameters())
    assert torch.equal(critic[1].running_var, statistics), "a buffer is not a weight"
    weight = torch.ones(3)
    assert clip_weights_(weight, 0.5) is weight
    assert weight.tolist() == [0.5] * 3
    parameters = critic.parameters()
    assert clip_weights_(parameters, 0.001) is parameters
    assert critic[2].weight.abs().max() <= 0.001
    assert clip_weights_([], 0.01) == []


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_autograd_sees_that_a_weight_was_modified(implementation: Callable) -> None:
    for make in (lambda: torch.randn(5, 7), lambda: torch.randn(5, 14)[:, ::2]):
        weight = make().requires_grad_()
        loss = weight.square().sum()
        version = weight._version
        implementation([weight], -0.01, 0.01)
        assert weight._version > version
        assert weight.is_leaf
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


def test_weights_still_train_after_clipping() -> None:
    critic = nn.Linear(3, 1)
    clip_weights_(critic, 0.01)
    critic(torch.ones(2, 3)).sum().backward()
    assert critic.weight.grad.tolist() == [[2, 2, 2]]


def test_inference_tensors_are_refused_outside_inference_mode() -> None:
    with torch.inference_mode():
        weight = torch.ones(3)
        clip_weights_(weight, 0.5)
    assert weight.tolist() == [0.5] * 3
    with pytest.raises(RuntimeError, match=r"[Ii]nference"):
        clip_weights_(weight, 0.25)
    assert weight.tolist() == [0.5] * 3


@pytest.mark.parametrize(
    ("tensors", "error", "match"),
    [
        (3, TypeError, "module_or_tensors must be a module, a tensor or an iterable of tensors, got int"),
        ([torch.ones(2), 3.0], TypeError, r"module_or_tensors\[1\] .* got float"),
        ([torch.ones(2), torch.ones(2, dtype=torch.int64)], TypeError, r"\[1\] .* got torch.int64"),
        ([torch.ones(2), torch.ones(2, dtype=torch.complex64)], TypeError, r"\[1\] .* got torch.complex64"),
        ([torch.ones(2), torch.ones(2).to(torch.float8_e5m2)], TypeError, r"\[1\] .* got torch.float8_e5m2"),
        ([torch.ones(2), torch.ones(2, 2).to_sparse()], TypeError, r"\[1\] .* layout torch.sparse_coo"),
        ([torch.ones(2), torch.ones(1).expand(3)], ValueError, r"\[1\] must not overlap .*\[3\] with strides \[0\]"),
        ([torch.ones(2), torch.ones(9).as_strided((3, 3), (2, 1))], ValueError, r"\[1\] must not overlap"),
    ],
)
def test_a_refused_tensor_leaves_every_tensor_untouched(tensors: object, error: type, match: str) -> None:
    with pytest.raises(error, match=match):
        clip_weights_(tensors, 0.01)
    if isinstance(tensors, list):
        assert tensors[0].tolist() == [1, 1]
        assert tensors[0]._version == 0


@pytest.mark.parametrize("bound", [0, -0.01, math.nan, (1.0, 0.0), (math.nan, 1.0), (0.0, math.nan)])
def test_a_bound_that_is_no_range_is_refused(bound: object) -> None:
    weight = torch.ones(3)
    with pytest.raises(ValueError, match=r"^bound must be .*got "):
        clip_weights_(weight, bound)
    assert weight.tolist() == [1, 1, 1]


@pytest.mark.parametrize("bound", ["0.01", None, ("a", "b"), [0.0, 1.0], (1.0,), (1, 2, 3)])
def test_a_bound_of_another_type_is_refused(bound: object) -> None:
    with pytest.raises(TypeError, match=r"^bound must be a number or a pair \(low, high\) of numbers, got "):
        clip_weights_(torch.ones(3), bound)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_the_operator_refuses_what_it_cannot_write(implementation: Callable) -> None:
    weight = torch.ones(3)
    with pytest.raises((ValueError, RuntimeError), match="low must be at most high"):
        implementation([weight], 1.0, math.nan)
    with pytest.raises(RuntimeError):
        implementation([torch.ones(1).expand(3)], -0.5, 0.5)
    assert weight.tolist() == [1, 1, 1]


def samples(device: str) -> list[tuple[list[Tensor], float, float]]:
    make = lambda *shape, **options: torch.randn(*shape, device=device, **options)  # noqa: E731
    return [
        ([make(3)], -0.01, 0.01),
        ([make(3, requires_grad=True), make(63, 5, requires_grad=True)], -0.01, 0.01),
        ([make(7, 5).t(), make(2, 3, 4, 5).to(memory_format=torch.channels_last)], -0.5, 0.25),
        ([make(10)[::2], make(0), make(())], -1.0, 1.0),
        ([make(9, dtype=dtype) for dtype in DTYPES], 0.0, math.inf),
    ]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("sample", range(5))
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_the_operator_is_registered_correctly(sample: int, device: str) -> None:
    torch.library.opcheck(torch.ops.wgan_fast.clip_weights_.default, samples(device)[sample])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_it_compiles_into_one_graph(backend: str, device: str) -> None:
    critic = nn.Sequential(nn.Linear(5, 7), nn.LeakyReLU(0.2), nn.Linear(7, 1)).to(device)
    expected = [clamped(parameter.detach(), -0.01, 0.01) for parameter in critic.parameters()]
    x = torch.randn(3, 5, device=device)

    @torch.compile(fullgraph=True, backend=backend)
    def clip_and_score(x: Tensor) -> Tensor:
        clip_weights_(critic, 0.01)
        return critic(x)

    scores = clip_and_score(x)
    for parameter, reference in zip(critic.parameters(), expected):
        assert_same_bits(parameter.detach(), reference)
    assert torch.equal(scores, critic(x))


def test_a_critic_on_the_meta_device_is_left_alone() -> None:
    assert clip_weights_(nn.Linear(3, 1, device="meta")).weight.is_meta


gpu_kernel = pytest.mark.skipif(not build_info()["cuda"]["active"], reason="no GPU, or no CUDA in the extension")


@gpu_kernel
def test_a_whole_list_is_one_launch() -> None:
    tensors = [torch.ones(size, device="cuda", dtype=dtype) for size in (0, 1, 63, 70_001) for dtype in DTYPES]
    clip_weights_(tensors, 0.5)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        clip_weights_(tensors, 0.25)
        torch.cuda.synchronize()
    kernels = [event.name for event in profile.events() if event.device_type == torch.profiler.DeviceType.CUDA]
    assert len(kernels) == 1, kernels


@gpu_kernel
def test_a_cuda_graph_replays_it_on_the_captured_stream() -> None:
    weight = torch.full((1003,), 7.0, device="cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        clip_weights_(weight, 0.01)
    assert (weight == 7).all(), "capturing is not running"
    graph.replay()
    assert (weight == 0.01).all()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_a_list_may_lie_on_several_devices() -> None:
    tensors = [torch.ones(5), torch.ones(5, device="cuda"), torch.ones(5)]
    clip_weights_(tensors, 0.5)
    assert [tensor.tolist() for tensor in tensors] == [[0.5] * 5] * 3
