"""One process and one device for all stages: no transport and no concurrency."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

from benchmarks.peers.work import AUDIO_STEP_S, Job, Microphone, Peer, Report
from benchmarks.standin import content
from benchmarks.standin.step import Step


class Loop:
    """Runs block after block, level after level."""

    def __init__(self, step_s: float) -> None:
        self._device, self._audio = Step(step_s), Step(AUDIO_STEP_S)

    def work(self, job: Job) -> Report:
        report = Report()
        microphone = Microphone(job, report)
        for block in range(job.num_blocks):
            audio = microphone.read(block)
            features = self._audio.run(partial(content.PUBLIC.features_of, audio))
            latent = content.PUBLIC.initial_latent(features)
            for level in range(content.NUM_LEVELS):
                latent = self._device.run(partial(content.denoise, latent, level))
            report.add(audio, self._device.run(partial(content.decode, latent)))
        return report


@contextmanager
def peer(step_s: float) -> Iterator[tuple[Peer, list[int]]]:
    """Give the peer and the ids of its other processes."""
    yield Loop(step_s), []
