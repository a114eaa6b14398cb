"""The network that turns noise into latents, one block and one level at a time.

    Block (features) --level 0 .. N-1--> Block (latent)

`model` computes, `cache` remembers, `denoiser` joins them to a streaming model.
"""
