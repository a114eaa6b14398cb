"""The figures that a deployment promises to one more live session: the rate of its video, and its reaction times.

    DeploymentInfo (the workers that the session would use, the loads of all) -> Promise -> GetCapabilities, admission

A queue runs one step at a time, and a CPU as many steps as its cores can. The rate is that of the queue or device which
the new session and the open live streams need most of. A deployment that is slower than real time promises no times.
"""

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

from avatar.runtime.admission import LIVE_SHARE
from avatar.worker.v1.types_pb2 import DeviceLoad
from services.gateway.workers import DeploymentInfo

# Allowance for handing a block on. 3.7 to 5.4 ms were measured (docs/benchmarks.md).
HOP_S = 0.005


@dataclass(frozen=True)
class Promise:
    """Promised figures of one more live session: fields of GetCapabilities. Times are 0 if none is promised.

    sustained_rate: seconds of video that the devices can compute for it each second; 0 if no step was measured yet.
    reaction_s: from the piece that carries a sound to the frame that shows it, for audio in real time.
    reaction_ahead_s: the same for audio that is sent at once: its first block and lookahead need not be waited for.
    hold_s: from an interrupt to the next idle frame.
    """

    sustained_rate: float
    reaction_s: float = 0.0
    reaction_ahead_s: float = 0.0
    hold_s: float = 0.0

    @property
    def is_too_slow(self) -> bool:
        """True if the deployment cannot keep up with real time."""
        return 0 < self.sustained_rate < 1

    @property
    def rate_text(self) -> str:
        """The rate, in words for a client."""
        return f"the deployment computes {self.sustained_rate:.2f} seconds of video a second for one more live stream"


def promise(info: DeploymentInfo, patience_s: float) -> Promise:
    """Return what the workers' measured steps and present loads promise to one more live session.

    patience_s: the gateway's setting.
    """
    queues = _by_queue(info.session_loads)
    rate = sustained_rate(queues.values(), info.loads)
    promised = Promise(rate)
    if promised.is_too_slow:
        return promised
    steps_s = [info.audio.step_s, *(each.step_s for each in info.denoisers), info.first_frames_s()]
    num_hops = len(steps_s) + 1
    # Live streams of others have at most one step in a queue, each in every stage, before each of the session's.
    others_s = sum(load.live_share for load in queues.values()) * info.block_s
    through_s = sum(steps_s) + others_s + num_hops * HOP_S
    # The session's block before is in the busiest queue, or a step that was started just before runs to its end.
    step_s = max(steps_s)
    before_s = max((load.session_share for load in queues.values()), default=0.0) * info.block_s
    ahead_s = through_s + max(step_s, before_s)
    # In real time, an idle block is started no later than `patience_s` before the speech of the next one is complete.
    fill_s = info.block_s + info.audio.lookahead_s
    return Promise(rate, fill_s + through_s + max(step_s, before_s - patience_s), ahead_s, ahead_s)


def sustained_rate(session: Iterable[DeviceLoad], loads: Iterable[DeviceLoad]) -> float:
    """Return the seconds of video that the devices can compute each second for one more session; 0 if unknown.

    session: loads at the workers that it would use. loads: at all workers of the deployment, which share devices with
    these. LIVE_SHARE of the time is counted; the rest is for openings and prefills.
    """
    queues = _by_queue(session)
    if not any(load.session_share for load in queues.values()):
        return 0.0
    cores_needed, num_cores = defaultdict[str, float](float), defaultdict[str, int](int)
    for load in queues.values():
        cores_needed[load.device] += load.session_share * load.num_threads
    for load in _by_queue(loads).values():
        cores_needed[load.device] += load.live_share * load.num_threads
        num_cores[load.device] = max(num_cores[load.device], load.num_cores)
    of_queues = [load.session_share + load.live_share for load in queues.values()]
    of_devices = [cores_needed[load.device] / max(1, num_cores[load.device]) for load in queues.values()]
    return LIVE_SHARE / max(*of_queues, *of_devices)


def _by_queue(loads: Iterable[DeviceLoad]) -> dict[str, DeviceLoad]:
    """Return one load for each queue: the largest that its services report. Workers of older versions report none."""
    largest: dict[str, DeviceLoad] = {}
    for load in loads:
        if load.queue and (load.queue not in largest or load.live_share > largest[load.queue].live_share):
            largest[load.queue] = load
    return largest
