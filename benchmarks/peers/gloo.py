"""The reference's pattern, rewritten: one rank per level, one that decodes, blocking send and receive over gloo.

    audio -> rank 4 -> rank 0 -> 1 -> 2 -> 3 -> rank 4 -> frames

In its live variant the decoder's rank receives the audio. Once it has the latent that rank 3 finished, it sends the
features of the block that rank 0 starts next; features travel from level to level along with the latents. Four blocks
form a clip. At the last block of the first clip the decoder's rank broadcasts the new sink; all levels wait for it and
prefill. The first two clips are silent: their blocks are rendered and not counted.
Source: `causal_s2v_pipeline_tpp_blockwise` of Alibaba-Quark/LiveAvatar, for the order of messages; no code is copied.
"""

import socket
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import partial

import torch
import torch.distributed as dist

from benchmarks.peers.work import AUDIO_STEP_S, DECODER, Job, Microphone, Peer, Report, processes
from benchmarks.standin import content
from benchmarks.standin.step import Step

CLIP_BLOCKS = 4
SILENT_BLOCKS = 2 * CLIP_BLOCKS
SINK_BYTES = content.PUBLIC.latent_bytes // 3
# Relative to a level's step.
PREFILL_STEPS = 0.6
LOST_S = 1800.0


class Decoder:
    """Rank 4: audio in, frames out."""

    def __init__(self, step_s: float) -> None:
        self._device, self._audio = Step(step_s), Step(AUDIO_STEP_S)

    def work(self, job: Job) -> Report:
        report = Report()
        microphone = Microphone(job, report)
        total = SILENT_BLOCKS + job.num_blocks
        dist.broadcast(torch.tensor([total]), DECODER)
        pending: dict[int, bytes] = {}

        def send_features(block: int) -> None:
            if SILENT_BLOCKS <= block < total:
                pending[block] = audio = microphone.read(block - SILENT_BLOCKS)
                dist.send(_tensor(self._audio.run(partial(content.PUBLIC.features_of, audio))), 0)

        for block in range(total):
            if job.pace == "alone":
                send_features(block)
            latent = _received(content.PUBLIC.latent_bytes, DECODER - 1)
            if job.pace != "alone":
                send_features(block + CLIP_BLOCKS)  # any earlier, all ranks would block in send
            if block == CLIP_BLOCKS - 1:
                dist.broadcast(latent[:SINK_BYTES].clone(), DECODER)
            picture = self._device.run(partial(content.decode, latent.numpy()))
            if block in pending:
                report.add(pending.pop(block), picture)
        return report


def serve(level: int, port: int, step_s: float) -> None:
    """Run the rank of a level."""
    _join(level, port)
    device = Step(step_s)
    while True:
        dist.broadcast(total := torch.zeros(1, dtype=torch.int64), DECODER)
        for block in range(int(total)):
            if block == CLIP_BLOCKS:
                dist.broadcast(torch.empty(SINK_BYTES, dtype=torch.uint8), DECODER)
                Step(step_s * PREFILL_STEPS).run(lambda: None)
            features = torch.zeros(content.PUBLIC.features_bytes, dtype=torch.uint8)
            if level or block >= SILENT_BLOCKS:
                dist.recv(features, (level or DECODER + 1) - 1)
            if level:
                start = _received(content.PUBLIC.latent_bytes, level - 1).numpy()
            else:
                start = content.PUBLIC.initial_latent(features.numpy().data)
            latent = device.run(partial(content.denoise, start, level))
            if level < DECODER - 1:
                dist.send(features, level + 1)
            dist.send(torch.from_numpy(latent), level + 1)


def _tensor(data: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)


def _received(num_bytes: int, rank: int) -> torch.Tensor:
    data = torch.empty(num_bytes, dtype=torch.uint8)
    dist.recv(data, rank)
    return data


def _join(rank: int, port: int) -> None:
    torch.set_num_threads(1)
    lost = timedelta(seconds=LOST_S)
    at = f"tcp://127.0.0.1:{port}"
    dist.init_process_group("gloo", init_method=at, rank=rank, world_size=DECODER + 1, timeout=lost)


@contextmanager
def peer(step_s: float) -> Iterator[tuple[Peer, list[int]]]:
    """Give the peer and the ids of its other processes."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with processes(serve, [(level, port, step_s) for level in range(content.NUM_LEVELS)]) as pids:
        _join(DECODER, port)
        yield Decoder(step_s), pids
