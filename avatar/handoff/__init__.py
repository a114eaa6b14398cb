"""Direct transfer of latents from a level's process to the next level's, while gRPC carries the control messages.

`chain` is the workers' side, over torch.distributed; `client` is the stage that opens all levels of a chain as one.
"""
