"""The figures of the whole pipeline over stand-in stages: the real gateway, the real Redis, clients in a process."""
