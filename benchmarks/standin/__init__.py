"""Stand-in stages: workers that speak the real contract, wait a given time for each block, and change it exactly.

    python -m benchmarks.standin STAGE --listen HOST:PORT --step-s SECONDS [--level N]

What is left of a block's time is the system's share, on any machine. The change is one that only all levels in their
order make, so a picture proves the way that its block took.
"""
