"""How well a checkpoint's people speak: `python -m training.evaluate CHECKPOINT` prints one table."""

from collections.abc import Sequence
from pathlib import Path

from avatar.denoiser.config import NetworkConfig
from avatar.denoiser.model import Network
from training import rollouts
from training.data import StoredClip
from training.landmarks import Landmarks
from training.takes import edge_ratio, mouth_figures, mouths_of, take_of


def quick(
    checkpoint: Path, clips: Sequence[StoredClip], denoiser: tuple[Network, NetworkConfig] | None = None
) -> dict[str, float | None]:
    """lip_sync_r, mouth_amplitude and edge_energy on these clips, for a look while training: about 6 s a clip.

    denoiser: a network and its configuration in place of the checkpoint's. A figure without faces to read is None.
    """
    models, landmarks = rollouts.load(checkpoint, denoiser=denoiser), Landmarks()
    takes = [take_of(models, clip) for clip in clips]
    return {**mouth_figures([mouths_of(take, landmarks) for take in takes]), "edge_energy": edge_ratio(takes)}
