"""One level of denoising as a streaming model.

    Block (features) --level 0--> Block (latent) --level 1--> ... --level N-1--> Block (clean latent)

Every level has its own KV cache: a block attends to earlier blocks at its own noise level, never to finished ones. So
levels can run in separate processes, and data flows one way (timestep-forcing pipeline parallelism, arXiv 2512.04677).

Axes: c channels, t latent frames, h w of latents, l encoder layers, d width, f pixel frames, m face motion.
"""

from collections import defaultdict
from collections.abc import Collection
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from einops import repeat
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from avatar.denoiser.attention import grid_size, reference_frame
from avatar.denoiser.cache import KVCache, Prefilled, Prefills, SessionPrefill
from avatar.denoiser.config import PATCH, NetworkConfig, is_sink_distance
from avatar.denoiser.model import Network, to_velocity
from avatar.denoiser.sampler import (
    SAMPLERS,
    NoiseHistory,
    NoiseSource,
    correlated_noise,
    noise,
    sink_distance,
    timesteps,
)
from avatar.types import FACE_MOTION, Block, Conditions, Session

# In latents: the side of the coarsest motion token.
SMALLEST_SIDE = 8
# Tensors of a block that a step reads.
INPUTS = ("noise", "latent", "moved", "features", "heard", "face_motion", "pose")


@dataclass(eq=False)
class DenoiserState:
    """The state of one session at one level.

    sink_distance: the session's, or the checkpoint's.
    masks: (1, a, t, n, 1), the session's, for every token of a block.
    prefills: the session's, shared with its other levels. prefilled: of the version whose sink is in the cache; None
    before the first block. next_index: index of the next block; None before the first.
    preceding: the last columns of `features` and `heard` that the next block is encoded with. noise: of level 0.
    """

    session: Session
    cache: KVCache
    sink_distance: int | tuple[int, int]
    masks: Tensor | None
    prefills: SessionPrefill = field(init=False)
    prefilled: Prefilled | None = None
    next_index: int | None = None
    preceding: dict[str, Tensor] = field(default_factory=dict)
    noise: NoiseHistory = field(default_factory=NoiseHistory)


class Denoiser:
    """The streaming model of one level of the schedule; several levels may share a network."""

    def __init__(
        self,
        network: Network,
        config: NetworkConfig,
        level: int,
        noise: NoiseSource = noise,
        *,
        sizes: Collection[tuple[int, int]] | None = None,
        attention: SDPBackend | None = None,
        prefills: Prefills | None = None,
        kv_dtype: torch.dtype | None = None,
    ) -> None:
        """Create the model of one level. ValueError if the schedule has no such level.

        noise: initial noise of level 0. sizes: (height, width) of the latents that are served; None: any.
        attention: the attention kernel; None: torch chooses. prefills: those of the network, which its levels share;
        None: this level shares them with none. kv_dtype: of the window's keys and values, the network's dtype or
        float8; None: the network's.
        """
        if not 0 <= level < config.num_levels:
            raise ValueError(f"level must be 0 to {config.num_levels - 1}, as the schedule has it, got {level}")
        self.network, self.config, self.level = network, config, level
        self.sigma, self.sigma_next = config.schedule[level : level + 2]
        self._noise = noise
        self._sizes = sizes
        self._attention, self._kv_dtype = attention, kv_dtype
        self._prefills = Prefills() if prefills is None else prefills
        self._uploader = Uploader(network.device)
        with torch.no_grad():
            self._modulation = network.embed_time(timesteps(config.schedule)[level].to(network.device).reshape(1, 1))

    @property
    def is_last(self) -> bool:
        """True for the level whose results are clean."""
        return self.level == self.config.num_levels - 1

    @property
    def history_blocks(self) -> int:
        """Past blocks that a reopened stream must step through first, to fill its window again.

        Their keys and values differ slightly from the lost ones, whose blocks had attended to still earlier blocks.
        """
        return self.config.window_blocks - 1

    def sink_update_block(self, session: Session) -> int | None:
        """Return the first block whose sink is the result of block 0; None: the reference stays the sink."""
        if session.sink_update_block is None:
            return self.config.sink_update_block
        return session.sink_update_block or None

    def updates_sink(self, session: Session) -> bool:
        """Return True if this level's result of block 0 becomes the sink of the session's next conditions."""
        return self.is_last and self.sink_update_block(session) is not None

    def open(self, session: Session) -> DenoiserState:
        """Return a state with an empty cache. ValueError if the session does not fit the network."""
        height, width = self.check(session)
        distance = self.config.sink_distance if session.sink_distance is None else session.sink_distance
        cache = self._cache(height, width, self.network.device)
        state = DenoiserState(session, cache, distance, self._masks(session, height, width))
        state.prefills = self._prefills.join(state)
        return state

    def check(self, session: Session) -> tuple[int, int]:
        """Return height and width of a session's latents. ValueError if the session does not fit the network."""
        channels, shape = self.config.in_dim, tuple(session.motion.shape)
        if len(shape) != 4 or shape[0] != channels or not shape[1]:
            raise ValueError(f"motion latents must have shape ({channels}, t, h, w), got {shape}")
        height, width = shape[2:]
        if height % PATCH or width % PATCH or min(height, width) < SMALLEST_SIDE:
            raise ValueError(f"latents must have even sides of at least {SMALLEST_SIDE}, got {height}x{width}")
        if session.sink_distance is not None and not is_sink_distance(session.sink_distance):
            raise ValueError(f"sink_distance must be a number or (low, high), got {session.sink_distance}")
        if self._sizes is not None and (height, width) not in self._sizes:
            served = ", ".join(f"{h}x{w}" for h, w in self._sizes)
            raise ValueError(f"latents of {height}x{width} are not served here, only {served}")
        return height, width

    def memory(self, height: int, width: int) -> tuple[int, int]:
        """Return the bytes of a session's state at this level, and of what its levels share: prefills.

        height, width: of the latents. A prefill's sink lasts until each level has copied it; text and texture are there
        twice while levels pass from one version to the next.
        """
        config, cache = self.config, self._cache(height, width, "meta")
        tokens = cache.sink_tokens + 2 * config.text_len
        numbers = 2 * config.num_layers * tokens * config.dim
        if config.mover:
            numbers += 2 * self.network.mover.texture_numbers(height, width)
        return cache.num_bytes, numbers * self.network.dtype.itemsize

    def _cache(self, height: int, width: int, device: torch.device | str) -> KVCache:
        dtype = self.network.dtype
        return KVCache(self.config, height, width, dtype=dtype, device=device, window_dtype=self._kv_dtype)

    @torch.no_grad()
    def prefill(self, conditions: Conditions, state: DenoiserState) -> None:
        """Prefill a version of the conditions ahead of its first block. ValueError if it does not fit the network.

        Does nothing if another level has done it, or while one of them still has to pass to the version before.
        """
        self._check_conditions(conditions, state)
        with self._kernel():
            state.prefills.get_ahead(conditions, partial(self._prefill, state.session))

    def with_noise(self, block: Block, session: Session, history: NoiseHistory) -> Block:
        """Return the block with the noise that level 0 starts from; optional, and ahead of `upload`.

        history: of the stream, updated in place.
        """
        frames, correlation = self.config.num_frames_per_block, self.config.noise_correlation
        initial = correlated_noise(self._noise, session, block.index, frames, correlation, history)
        return replace(block, noise=self.config.noise_scale * initial, latent=None)

    def upload(self, block: Block) -> Block:
        """Return the block with its inputs on the network's device; optional, and ahead of `step`."""
        return self._uploader.upload(block)

    @torch.no_grad()
    def step(self, block: Block, state: DenoiserState) -> Block:
        """Return the block one level cleaner; its latent (c, t, h, w) has the network's dtype and device.

        Blocks come in order; a stream may start with any index. ValueError if one does not follow, or does not fit.
        """
        conditions = self._check(block, state)
        with self._kernel():
            if state.prefilled is None or state.prefilled.version != conditions.version:
                state.prefilled = prefilled = state.prefills.get(conditions, partial(self._prefill, state.session))
                assert prefilled.sink is not None
                state.cache.set_sink(prefilled.sink)
            state.prefills.release()
            state.next_index = block.index + 1
            distance = sink_distance(state.session, block.index, self.level, state.sink_distance)
            state.cache.start_block(block.index, reference_frame(self._first_frame(block), distance))
            latent, moved = self._denoise(block, state.prefilled, state)
            return replace(block, latent=latent, moved=None if self.is_last else moved)

    def _denoise(self, block: Block, prefilled: Prefilled, state: DenoiserState) -> tuple[Tensor, Tensor | None]:
        """Return the latent (c, t, h, w) after this level's step, and the moved reference of a network with a mover.

        The cache has a slot for the block.
        """
        network = self.network
        if self.level == 0 and block.noise is None:
            block = self.with_noise(block, state.session, state.noise)
        block = self.upload(block)
        self._uploader.wait(block)
        start = block.latent if self.level else block.noise
        assert start is not None
        x = start.to(network.dtype).unsqueeze(0)
        features = block.features if state.masks is not None else block.features.unsqueeze(0)
        features, before = self._with_preceding("features", features, state)
        audio = network.encode_audio(features, state.masks, before)
        heard = None
        if block.heard is None:
            state.preceding.pop("heard", None)
        else:
            features, before = self._with_preceding("heard", block.heard.unsqueeze(0), state)
            heard = network.encode_heard(features, preceding=before)
        values = None if block.face_motion is None else block.face_motion.unsqueeze(0)
        motion = None if values is None else network.embed_face_motion(values)
        reference, pose, moved = prefilled.reference, prefilled.pose, block.moved
        if prefilled.texture is not None:
            if moved is None:
                moved = network.move(reference, audio, heard, values, texture=prefilled.texture).to(x.dtype)[0]
            reference = pose = moved.to(x.dtype).unsqueeze(0)
        elif block.pose is not None:
            pose = block.pose.to(x).unsqueeze(0)
        first_frame = self._first_frame(block)
        output = network(x, self._modulation, prefilled.text, audio, pose, first_frame, state.cache, heard, motion)
        velocity = to_velocity(output, x, reference, self.sigma, self.config)
        return SAMPLERS[self.config.sampler](x, velocity, self.sigma, self.sigma_next)[0], moved

    def _with_preceding(self, name: str, features: Tensor, state: DenoiserState) -> tuple[Tensor, Tensor | None]:
        """Return features (a, l, d, f) as a batch, and the columns before them; keep those before the next block."""
        features, before = features.unsqueeze(0), state.preceding.get(name)
        if context := self.config.audio_context_frames:
            columns = features if before is None else torch.cat([before, features], dim=-1)
            missing = max(0, context - columns.shape[-1])
            first = columns[..., :1].expand(*columns.shape[:-1], missing)
            state.preceding[name] = torch.cat([first, columns[..., -context:]], dim=-1)
        return features, before

    def _first_frame(self, block: Block) -> int:
        return block.index * self.config.num_frames_per_block

    def _masks(self, session: Session, height: int, width: int) -> Tensor | None:
        if session.masks is None:
            return None
        check_shape("masks", session.masks, len(session.masks), *grid_size(height, width))
        masks = session.masks.to(self.network.device)
        return repeat(masks, "a rows columns -> 1 a t (rows columns) 1", t=self.config.num_frames_per_block)

    def warm(self, height: int, width: int) -> int:
        """Step through every shape that a stream of height x width latents has: a window of blocks, and one more.

        Returns the number of blocks.
        """
        num_blocks = self.config.window_blocks + 1
        state = self.open(blank_session(self.config, height, width))
        for index in range(num_blocks):
            block = self.step(blank_block(self.config, index, height, width), state)
        assert block.latent is not None
        block.latent.cpu()  # waits for a GPU
        return num_blocks

    def _prefill(self, session: Session, conditions: Conditions) -> Prefilled:
        network, config = self.network, self.config
        reference = conditions.sink.to(network.device).unsqueeze(0)
        words = conditions.text if len(conditions.text) else conditions.text.new_zeros(0, config.text_dim)
        text = network.embed_text(words.to(network.device).unsqueeze(0))
        sink = network.prefill(reference, session.motion.to(network.device).unsqueeze(0), text)
        pose = repeat(reference.to(network.dtype), "b c 1 h w -> b c t h w", t=config.num_frames_per_block)
        if config.pose == "zeros":
            pose = torch.zeros_like(pose)
        return Prefilled(conditions, reference, pose, network.read_texture(reference), text, sink)

    def _kernel(self) -> AbstractContextManager[None]:
        """Return the context of the attention kernel."""
        return nullcontext() if self._attention is None else sdpa_kernel(self._attention)

    def _check(self, block: Block, state: DenoiserState) -> Conditions:
        """Return the block's conditions. ValueError if the block does not fit the session or the network."""
        config = self.config
        channels, _, height, width = state.session.motion.shape
        if block.index < 0 or state.next_index not in (None, block.index):
            raise ValueError(f"expected block {state.next_index or 0}, got {block.index}; blocks come in order")
        if block.conditions is None:
            raise ValueError(f"block {block.index} has no conditions; they are attached when a block is admitted")
        actors = () if state.session.masks is None else (len(state.session.masks),)
        columns = config.num_encoder_layers, config.audio_dim, config.frames_per_block
        check_shape("features", block.features, *actors, *columns)
        taken = {"heard": columns, "face_motion": (len(FACE_MOTION), config.frames_per_block)}
        for name, shape in taken.items():
            given = getattr(block, name)
            if given is not None:
                if name not in config.inputs:
                    raise ValueError(f"block {block.index} has {name}, which this checkpoint's network does not take")
                check_shape(name, given, *shape)
        if block.pose is not None:
            if config.pose != "zeros":
                raise ValueError("this checkpoint's pose input carries the reference; it takes no pose video")
            check_shape("pose", block.pose, config.cond_dim, config.num_frames_per_block, height, width)
        if block.moved is not None and config.mover:
            check_shape("moved", block.moved, channels, config.num_frames_per_block, height, width)
        if self.level:
            if block.latent is None:
                raise ValueError(f"block {block.index} has no latent; level {self.level} continues the level before it")
            check_shape("latent", block.latent, channels, config.num_frames_per_block, height, width)
        self._check_conditions(block.conditions, state)
        return block.conditions

    def _check_conditions(self, conditions: Conditions, state: DenoiserState) -> None:
        """Raise ValueError if conditions do not fit the session or the network."""
        config = self.config
        channels, _, height, width = state.session.motion.shape
        check_shape("sink", conditions.sink, channels, 1, height, width)
        if conditions.text.ndim != 2:
            shape = tuple(conditions.text.shape)
            raise ValueError(f"text must have shape (n, {config.text_dim}), got {shape}")
        rows = len(conditions.text)
        if rows > config.text_len:
            raise ValueError(f"text has {rows} tokens, the network reads at most {config.text_len}")
        if rows:
            check_shape("text", conditions.text, rows, config.text_dim)


class Uploader:
    """Copies the inputs of blocks to one device, those of one dtype at once.

    A GPU's copies run on a stream of their own, from pinned memory: neither the host nor the GPU waits for them, and
    those of the next block run while the block before is computed.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]

    def upload(self, block: Block) -> Block:
        """Return the block with its inputs on the device; on a GPU they arrive later, and `wait` comes before use."""
        names: dict[torch.dtype, list[str]] = defaultdict(list)
        for name in INPUTS:
            tensor = getattr(block, name)
            if tensor is not None and tensor.device != self._device:
                names[tensor.dtype].append(name)
        moved: dict[str, Any] = {}
        with torch.cuda.stream(self._stream):  # None: no effect
            for each in names.values():
                moved |= dict(zip(each, self._copy([getattr(block, name) for name in each]), strict=True))
        return replace(block, **moved) if moved else block

    def wait(self, block: Block) -> None:
        """Let what is computed from now on wait for the block's inputs. The host does not wait."""
        if self._stream is None:
            return
        computing = torch.cuda.current_stream(self._device)
        computing.wait_stream(self._stream)
        for tensor in (getattr(block, name) for name in INPUTS):
            if tensor is not None:  # its memory must not be reused before the computation has ended
                tensor.record_stream(computing)

    def _copy(self, tensors: list[Tensor]) -> list[Tensor]:
        """Return tensors of one dtype on the device, by one copy."""
        num_elements = [each.numel() for each in tensors]
        host = torch.empty(sum(num_elements), dtype=tensors[0].dtype, pin_memory=self._stream is not None)
        for part, tensor in zip(torch.split(host, num_elements), tensors, strict=True):
            part.copy_(tensor.reshape(-1))
        parts = torch.split(host.to(self._device, non_blocking=True), num_elements)
        return [part.view(tensor.shape) for part, tensor in zip(parts, tensors, strict=True)]


def blank_session(config: NetworkConfig, height: int, width: int) -> Session:
    """Return a session of zeros, to warm up or to measure with; height, width: of latents."""
    return Session("warm", 0, torch.zeros(config.in_dim, 1, height, width))


def blank_block(config: NetworkConfig, index: int, height: int, width: int) -> Block:
    """Return a block of zeros with all inputs that the network takes, for a blank session."""
    features = torch.zeros(config.num_encoder_layers, config.audio_dim, config.frames_per_block)
    latent = torch.zeros(config.in_dim, config.num_frames_per_block, height, width)
    conditions = Conditions(0, latent[:, :1], torch.zeros(0, config.text_dim))
    # The step of a network that listens is timed while it does.
    given = {"heard": features, "face_motion": torch.zeros(len(FACE_MOTION), config.frames_per_block)}
    inputs: dict[str, Any] = {name: given[name] for name in config.inputs}
    return Block(index, features, latent, conditions, **inputs)


def check_shape(name: str, tensor: Tensor, *shape: int) -> None:
    """Raise ValueError unless the tensor has this shape; name: for the message."""
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{name} must have shape {shape}, got {tuple(tensor.shape)}")
