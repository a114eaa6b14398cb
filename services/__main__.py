"""All services in one process, for development: `python -m services`; see services/local/suite.py."""

from services.local.suite import main
from services.process import run

if __name__ == "__main__":
    run(main)
