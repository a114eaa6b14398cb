"""Build the gateway's image and run it: `make test-containers`; with FULL=1 all images but worker-cuda, and compose.

Prints one line a step. Where the machine can't run containers, which takes root and Debian's packages, all is SKIPPED
with the reason and the status is 0; where it can, the first step that fails ends it with status 1. Afterwards nothing
is left but Debian's packages, which is checked.
"""

import argparse
import os
import sys

from tests.containers.base_images import ROOT, make_python_image, make_redis_image, pip_mounts
from tests.containers.engine import engine, missing
from tests.containers.isolation import run_isolated
from tests.containers.pods import check_pods
from tests.containers.single import check_gateway, check_image, check_stops, check_voice, redis_image
from tests.containers.steps import step
from tests.containers.suite import check_suite

# Targets of the Dockerfile, with the most MB that their images may have.
SIZES_MB = {"gateway": 250, "voice": 350, "worker-cpu": 1500}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--full", action="store_true", help="all images but worker-cuda, compose and a film")
    parser.add_argument("--isolated", action="store_true", help=argparse.SUPPRESS)
    flags = parser.parse_args()
    if flags.isolated:
        run(is_full=flags.full)
    elif reason := missing():
        print(f"SKIPPED: {reason}")
    else:
        sys.exit(run_isolated(sys.executable, "-m", "tests.containers", "--isolated", *sys.argv[1:]))


def run(*, is_full: bool) -> None:
    """Run all steps."""
    # A checkout of a careful user: whatever the image's user reads must be made readable by the Dockerfile.
    os.umask(0o077)
    with engine() as made:
        mounts = pip_mounts(made)
        with step("Python and Valkey images"):
            make_python_image(made)
            make_redis_image(made, redis_image())
            made.podman("network", "create", "alone")
        for target in SIZES_MB if is_full else ["gateway"]:
            with step(f"{target} image") as notes:
                made.build(target, mounts, ROOT)
                notes.append(check_image(made, target, SIZES_MB[target], mounts))
            if target == "gateway":
                with step("gateway alone, beside Redis") as notes:
                    notes.append(check_gateway(made))
        if is_full:
            with step("voice alone, beside Redis") as notes:
                notes.append(check_voice(made))
            with step("SIGTERM to a worker") as notes:
                notes.append(check_stops(made))
            check_suite(made)
            with step("the Deployments of Kubernetes, by podman kube play") as notes:
                notes.append(check_pods(made))


if __name__ == "__main__":
    main()
