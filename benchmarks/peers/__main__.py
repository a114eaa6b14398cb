"""A peer's process: `python -m benchmarks.peers {gloo,grpc,loop,zeromq} --step-s SECONDS`; one job per line."""

import argparse
import importlib
import json
import sys
from dataclasses import asdict

from benchmarks.peers import NAMES
from benchmarks.peers.work import Job
from benchmarks.pipeline.processes import cpu_seconds
from benchmarks.standin.step import set_timer_slack


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.peers", description=(__doc__ or "").strip())
    parser.add_argument("name", choices=NAMES)
    parser.add_argument("--step-s", type=float, required=True, help="seconds that a block takes at a stage")
    flags = parser.parse_args()
    set_timer_slack()
    with importlib.import_module(f"benchmarks.peers.{flags.name}").peer(flags.step_s) as (peer, pids):
        for line in sys.stdin:
            before = cpu_seconds(pids)
            report = peer.work(Job(**json.loads(line)))
            report.cpu_s = cpu_seconds(pids) - before
            print(json.dumps(asdict(report)), flush=True)


if __name__ == "__main__":
    main()
