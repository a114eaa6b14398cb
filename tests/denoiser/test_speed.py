"""Tests of avatar.denoiser.speed."""

from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters

from avatar.denoiser.attention import condition_positions
from avatar.denoiser.config import NetworkConfig
from avatar.denoiser.denoiser import Denoiser
from avatar.denoiser.model import Network
from avatar.denoiser.speed import attention_kernel, compile_layers, is_float8, use_float8
from avatar.types import Conditions, Session
from tests.denoiser.conftest import HEIGHT, WIDTH, random_block, random_network
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


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # raised inside torch
def test_a_warm_denoiser_compiles_nothing_more(
    network: Network,
    config: NetworkConfig,
    session: Session,
    conditions: Conditions,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    torch._dynamo.reset()
    # Graphs are traced as usual, but run eagerly: generating code for them takes minutes.
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    compiled = on(network, "cpu", torch.float32)
    compile_layers(compiled)
    levels = [Denoiser(compiled, config, level) for level in range(2)]
    counters.clear()
    for size in ((WIDTH, HEIGHT), (HEIGHT, WIDTH)):
        levels[0].warm(*size)
    # Two of the projections, and one per number of keys: prefill's, and those of a window of one to three blocks.
    assert counters["stats"]["unique_graphs"] == 2 + 4, "portrait and landscape have equal numbers of tokens"
    counters.clear()
    for denoiser in levels:
        streamed(denoiser, session, conditions, 5)
    assert not counters["stats"]


def test_warm_up_covers_every_number_of_keys(network: Network, config: NetworkConfig) -> None:
    keys: list[int] = []
    hook = network.layers[0].self_attn.register_forward_hook(lambda _, inputs, __: keys.append(inputs[1].shape[1]))
    with hook:
        Denoiser(network, config, 0).warm(HEIGHT, WIDTH)
    sink, block = len(condition_positions(HEIGHT, WIDTH)), 48
    assert set(keys) >= {sink, sink + block, sink + 2 * block, sink + 3 * block}, "prefill, then a window of three"


def test_float8_quantises_attention_feed_forward_and_injection_norms(config: NetworkConfig) -> None:
    with torch.device("meta"):
        network = Network(config)
    linear = {name for name, module in network.named_modules() if isinstance(module, nn.Linear)}
    taken = {name for name, module in network.named_modules() if is_float8(module, name)}
    assert linear - taken == {
        *("text_embedding.0", "text_embedding.2", "time_embedding.0", "time_embedding.2", "time_projection.1"),
        *("head.head", "casual_audio_encoder.encoder.final_linear"),
    }
    assert len(taken) == config.num_layers * 10 + len(config.audio_inject_layers) * 5


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
    pytest.importorskip("torchao")
    half, eighth = (on(random_network(config), "cuda", torch.bfloat16) for _ in range(2))
    use_float8(eighth)
    expected = streamed(Denoiser(half, config, 0), session, conditions).float()
    assert 0 < relative_rms(streamed(Denoiser(eighth, config, 0), session, conditions).float(), expected) < 0.1
