"""The denoisers of a worker, from its settings and checkpoint."""

import logging

from avatar.checkpoints.fields import check_ranges, parse_fields
from avatar.checkpoints.layouts import PICTURE, is_published, open_part
from avatar.checkpoints.lora import LoraAdapter
from avatar.denoiser import speed
from avatar.denoiser.cache import Prefills
from avatar.denoiser.denoiser import Denoiser
from avatar.denoiser.float8 import FLOAT8
from avatar.denoiser.model import load, with_levels
from avatar.settings import PREFIX, DenoiserSettings
from avatar.vae.picture.rule import PictureRule
from services.worker import device_and_dtype, naming_setting

logger = logging.getLogger(__name__)

# Pixels on a side of one latent, for a VAE of scale 1, and the largest scale.
SPACE_STRIDE, MAX_SCALE = 8, 64


def load_denoisers(settings: DenoiserSettings, sizes: list[tuple[int, int]]) -> tuple[dict[int, Denoiser], str]:
    """Return the denoiser of each level to serve, which share their weights, and the digest of the network.

    sizes: from `latent_sizes`. ValueError names a setting that the device or the checkpoint does not support.
    """
    adapter = LoraAdapter(settings.adapter, settings.adapter_alpha) if settings.adapter else None
    part = with_levels(open_part(settings.checkpoint, "denoiser", adapter), None)  # checks its configuration
    with naming_setting("schedule"):
        part = with_levels(part, settings.schedule)
    device, dtype = device_and_dtype(settings)
    network = load(part, device=device, dtype=dtype)
    with naming_setting("attention"):
        attention = speed.attention_kernel(settings.attention, network)
    if settings.float8:
        with naming_setting("float8"):
            if not settings.compile:
                raise ValueError(f"float8 is slower than bfloat16 unless it is compiled; set {PREFIX}COMPILE=true too")
            speed.use_float8(network)
    if settings.compile:
        speed.compile_layers(network)
    served = sizes if settings.compile else None
    config = network.config
    if config.num_levels < config.num_trained_levels:
        logger.warning("fewer levels than the checkpoint was trained for", extra={"levels": config.levels_text})
    for size in sizes:
        kernel = speed.kernel_of_step(config, *size, dtype, device, attention)
        logger.info("attention kernel", extra={"kernel": kernel, "latents": "x".join(map(str, size))})
    levels = settings.served_levels(config.num_levels)
    prefills = Prefills()
    kv_dtype = None if settings.kv_dtype == "auto" else FLOAT8
    denoisers = {
        level: Denoiser(network, config, level, sizes=served, attention=attention, prefills=prefills, kv_dtype=kv_dtype)
        for level in levels
    }
    return denoisers, part.digest()


def latent_sizes(settings: DenoiserSettings) -> list[tuple[int, int]]:
    """Return heights and widths, in latents, to warm up for: of the settings' sizes, or of the checkpoint's.

    ValueError if a size is no multiple of the VAE's stride, or if layers are compiled and there is no size.
    """
    pictures, stride, picture = settings.video_sizes(), SPACE_STRIDE, {}
    if is_published(settings.checkpoint):
        picture = PICTURE  # the VAE's file may be elsewhere
    elif (settings.checkpoint / "vae").is_dir():
        part = open_part(settings.checkpoint, "vae")
        network, picture = part.config.get("network", {}), part.config.get("picture", {})
        with part.naming_config():
            check_ranges(network, {"scale": (1, MAX_SCALE)}, "network.")
            parse_fields(PictureRule, picture, "picture.")
        stride *= network.get("scale", 1)
    if picture and not pictures:
        pictures = [*parse_fields(PictureRule, picture, "picture.").limited().all_sizes]
    if settings.compile and not pictures:
        raise ValueError(f"{PREFIX}COMPILE needs {PREFIX}SIZES: this checkpoint leaves the size of its videos open")
    if odd := [f"{width}x{height}" for width, height in pictures if width % stride or height % stride]:
        raise ValueError(f"{PREFIX}SIZES names {odd[0]}, expected multiples of {stride}")
    return [(height // stride, width // stride) for width, height in pictures]
