"""Costs that grow with the size of a fleet, measured with stand-in workers, many to a process."""
