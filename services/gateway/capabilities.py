"""The description of a deployment that GetCapabilities returns."""

from collections.abc import Sequence
from dataclasses import asdict

from avatar.settings import MAX_TEXT_CHARS, GatewaySettings
from avatar.v1 import avatar_service_pb2 as pb
from avatar.v1 import types_pb2 as types
from services.gateway.options import ENCODING_OF, MAX_RATE_HZ, MIN_RATE_HZ, context_s
from services.gateway.promise import promise
from services.gateway.workers import DeploymentInfo

FITS = {
    types.FIT_UNSPECIFIED: "",
    types.FIT_COVER: "cover",
    types.FIT_REFERENCE: "reference",
    types.FIT_FACE: "face",
}
FIT_OF = {name: fit for fit, name in FITS.items()}


def describe_capabilities(
    info: DeploymentInfo,
    settings: GatewaySettings,
    num_free: int,
    voice_languages: Sequence[str] = (),
    *,
    is_draining: bool,
) -> pb.GetCapabilitiesResponse:
    """Return formats, sizes, limits, promises, and the free sessions that a new live stream may have.

    num_free: sessions that the workers have capacity for. voice_languages: of the voice; empty if it takes any.
    """
    promised = promise(info, settings.patience_s)
    refuses_live = is_draining or (promised.is_too_slow and settings.slow_live == "refuse")
    video = types.VideoFormat(width=info.vae.width, height=info.vae.height, frame_rate_hz=info.vae.frame_rate_hz)
    return pb.GetCapabilitiesResponse(
        video=video,
        fit=FIT_OF[info.vae.fit],
        sizes_free=info.vae.sizes_free,
        max_audio_context_s=context_s(info.audio.max_right_frames),
        prompts=info.text is not None,
        max_prompt_bytes=settings.max_prompt_bytes if info.text is not None else 0,
        min_rate_hz=MIN_RATE_HZ,
        max_rate_hz=MAX_RATE_HZ,
        max_picture_bytes=settings.max_picture_bytes,
        max_audio_bytes=settings.max_audio_bytes,
        max_audio_ahead_s=settings.audio_ahead_s,
        block_frames=info.block_frames,
        num_levels=len(info.denoisers),
        schedule=info.schedule,
        num_trained_levels=info.denoisers[0].num_trained_levels,
        encodings=[ENCODING_OF[name] for name in info.encodings],
        max_live_ahead_s=settings.live_ahead_s,
        max_unread_s=settings.max_unread_s,
        max_silent_s=settings.silent_s,
        resume_s=settings.resume_s,
        cell=settings.cell,
        free_sessions=0 if refuses_live else num_free,
        draining=is_draining,
        voice=bool(settings.voice),
        listens=info.listens,
        max_text_chars=MAX_TEXT_CHARS if settings.voice else 0,
        voice_languages=voice_languages,
        video_formats=[
            types.VideoFormat(width=each.width, height=each.height, frame_rate_hz=info.vae.frame_rate_hz)
            for each in info.vae.sizes
        ],
        **asdict(promised),
    )
