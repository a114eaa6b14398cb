"""Latents that go from a level's process straight to the next level's, while gRPC keeps the control.

`chain` is the workers' end, over torch.distributed; `client` is the stage that opens all levels of a chain as one.
"""
