"""Pictures to latents, and latents to frames: the codecs, the VAE stage around them, and frame encodings.

picture file --read--> pixels --codec--> motion latents
Block (latent) --codec, latent frame by latent frame--> FrameChunk --encode--> JPEG, H.264 or fragmented MP4
"""
