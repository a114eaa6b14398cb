"""One process and one device for all stages: no transport, and nothing at the same time."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

from benchmarks.peers.work import AUDIO_STEP_S, Job, Microphone, Peer, Report
from benchmarks.standin import content
from benchmarks.standin.step import Step


class Loop:
    """Block after block, level after level."""

    def __init__(self, step_s: float) -> None:
        self._device, self._audio = Step(step_s), Step(AUDIO_STEP_S)

    def work(self, job: Job) -> Report:
        report = Report()
        microphone = Microphone(job, report)
        for block in range(job.num_blocks):
            sound = microphone.hear(block)
            features = self._audio.take(partial(content.heard, sound))
            latent = content.noise(features)
            for level in range(content.NUM_LEVELS):
                latent = self._device.take(partial(content.denoised, latent, level))
            report.came(sound, self._device.take(partial(content.decoded, latent)))
        return report


@contextmanager
def peer(step_s: float) -> Iterator[tuple[Peer, list[int]]]:
    """The peer, and the processes that it has beside this one."""
    yield Loop(step_s), []
