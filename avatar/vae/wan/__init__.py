"""The VAE of Wan 2.1: `network` is its encoder and decoder, `codec` drives them for clips and streams."""

from avatar.vae.wan.codec import WAN_MEAN, WAN_STD, WanCodec, WanConfig
from avatar.vae.wan.network import Slots

__all__ = ["WAN_MEAN", "WAN_STD", "Slots", "WanCodec", "WanConfig"]
