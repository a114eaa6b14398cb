"""Run a program that ends when its parent does: `python -m services.local.child PARENT_PID PROGRAM [ARGUMENT ...]`.

The kernel sends the signal, so that a parent that is killed leaves no process behind. Linux only: elsewhere the program
runs, but may outlive its parent.
"""

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1


def main() -> None:
    parent, program = int(sys.argv[1]), sys.argv[2:]
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it ended before the call
            sys.exit(1)
    os.execvp(program[0], program)


if __name__ == "__main__":
    main()
