"""The diffusion transformer that turns noise into latents, one block and one noise level at a time.

    Block (features) --level 0 .. N-1--> Block (latent)

`model` is the network, `cache` its KV cache, `denoiser` the streaming model of one level around both.
"""
