"""Tests of avatar.denoiser.speed."""

from functools import partial
from unittest.mock import patch

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters

from avatar.denoiser.attention import condition_positions
from avatar.denoiser.config import NetworkConfig
from avatar.denoiser.denoiser import Denoiser
from avatar.denoiser.float8 import quantise_linears
from avatar.denoiser.model import Network
from avatar.denoiser.speed import attention_kernel, compile_layers, kernel_of_step, use_float8
from avatar.types import Conditions, Session
from tests.denoiser.conftest import HEIGHT, WIDTH, every_length, random_block, random_network
from tests.denoiser.test_denoiser import relative_rms

NUM_BLOCKS = 20
# Relative RMS to the uncompiled network: the goldens' tolerance, and the error of half precision.
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2e-2}


def streamed(denoiser: Denoiser, session: Session, conditions: Conditions, num_blocks: int = NUM_BLOCKS) -> Tensor:
    """Return the latents of a new stream, on the CPU."""
    state = denoiser.open(session)
    made = [denoiser.step(random_block(denoiser.config, i, conditions), state).latent for i in range(num_blocks)]
    return torch.stack([latent.cpu() for latent in made if latent is not None])


def on(network: Network, device: torch.device | str, dtype: torch.dtype) -> Network:
    copy = Network(network.config).eval().requires_grad_(False)
    copy.load_state_dict(network.state_dict())
    return copy.to(device, dtype)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # raised inside torch
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_compiled_equals_eager(
    dtype: torch.dtype, network: Network, config: NetworkConfig, session: Session, conditions: Conditions
) -> None:
    torch._dynamo.reset()
    compiled, eager = (on(network, "cpu", dtype) for _ in range(2))
    compile_layers(compiled)
    answers, expected = (streamed(Denoiser(each, config, 0), session, conditions, 5) for each in (compiled, eager))
    assert relative_rms(answers.float(), expected.float()) <= TOLERANCE[dtype]


def compiled_graphs(
    network: Network, session: Session, conditions: Conditions, backend: str, has_float8: bool = False
) -> None:
    """Warm a compiled network up and stream through it; check what is compiled, and that nothing is later."""
    torch._dynamo.reset()
    compiled, uncompiled = (on(network, "cpu", torch.bfloat16) for _ in range(2))
    config = network.config
    if has_float8:
        for each in (compiled, uncompiled):
            quantise_linears(each)
    with patch("torch.compile", partial(torch.compile, backend=backend)):
        compile_layers(compiled)
        levels = [Denoiser(compiled, config, level) for level in range(2)]
        counters.clear()
        for size in ((WIDTH, HEIGHT), (HEIGHT, WIDTH)):
            levels[0].warm(*size)
        # Two of the projections, and one per number of keys: prefill's, and those of a window of one block to all.
        blocks = config.window_blocks
        assert counters["stats"]["unique_graphs"] == 2 + 1 + blocks, "both sizes have equal numbers of tokens"
        counters.clear()
        latents = [streamed(denoiser, session, conditions, blocks + 2) for denoiser in levels]
        assert not counters["stats"]
        assert not counters["graph_break"]
    eager = streamed(Denoiser(uncompiled, config, 0), session, conditions, blocks + 2)
    assert relative_rms(latents[0].float(), eager.float()) <= TOLERANCE[torch.bfloat16]


# Graphs are traced as usual, without a break, but run eagerly: generating code for them takes minutes.
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # raised inside torch
def test_a_warm_denoiser_compiles_nothing_more(network: Network, session: Session, conditions: Conditions) -> None:
    compiled_graphs(network, session, conditions, backend="eager")


@pytest.mark.slow
@every_length
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # raised inside torch
def test_layers_compile_to_whole_graphs(network: Network, session: Session, conditions: Conditions) -> None:
    compiled_graphs(network, session, conditions, backend="aot_eager")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # raised inside torch
def test_float8_layers_compile_to_whole_graphs(network: Network, session: Session, conditions: Conditions) -> None:
    compiled_graphs(network, session, conditions, backend="aot_eager", has_float8=True)


@pytest.mark.parametrize("name", ["auto", "math", "flash"])
def test_the_kernel_of_a_step_is_named(name: str, network: Network, config: NetworkConfig) -> None:
    kernel = attention_kernel(name, network)
    named = kernel_of_step(config, HEIGHT, WIDTH, torch.float32, torch.device("cpu"), kernel)
    assert named == {"auto": "flash"}.get(name, name)


def test_warm_up_covers_every_number_of_keys(network: Network, config: NetworkConfig) -> None:
    keys: list[int] = []
    hook = network.layers[0].self_attn.register_forward_hook(lambda _, inputs, __: keys.append(inputs[1].shape[1]))
    with hook:
        Denoiser(network, config, 0).warm(HEIGHT, WIDTH)
    sink, block = len(condition_positions(HEIGHT, WIDTH)), 48
    assert set(keys) >= {sink, sink + block, sink + 2 * block, sink + 3 * block}, "prefill, then a window of three"


def test_attention_kernels_give_equal_latents(
    network: Network, config: NetworkConfig, session: Session, conditions: Conditions
) -> None:
    assert attention_kernel("auto", network) is None
    by_choice = streamed(Denoiser(network, config, 0), session, conditions, 4)
    for name in ("math", "flash"):
        denoiser = Denoiser(network, config, 0, attention=attention_kernel(name, network))
        assert relative_rms(streamed(denoiser, session, conditions, 4), by_choice) < 2e-6


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_float8_stays_near_half_precision(config: NetworkConfig, session: Session, conditions: Conditions) -> None:
    half, eighth = (on(random_network(config), "cuda", torch.bfloat16) for _ in range(2))
    use_float8(eighth)
    expected = streamed(Denoiser(half, config, 0), session, conditions).float()
    assert 0 < relative_rms(streamed(Denoiser(eighth, config, 0), session, conditions).float(), expected) < 0.1


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_inputs_that_are_uploaded_ahead_give_equal_latents(
    network: Network, config: NetworkConfig, session: Session, conditions: Conditions
) -> None:
    denoiser = Denoiser(on(network, "cuda", torch.float32), config, 1)
    expected, state = streamed(denoiser, session, conditions), denoiser.open(session)
    blocks = [denoiser.upload(random_block(config, index, conditions)) for index in range(NUM_BLOCKS)]
    assert all(block.features.is_cuda for block in blocks)
    made = [denoiser.step(block, state).latent for block in blocks]
    assert torch.equal(torch.stack([latent.cpu() for latent in made if latent is not None]), expected)
