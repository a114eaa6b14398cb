"""An allocator with a cap, in place of a GPU's memory: `python -m tests.capped_allocator BYTES MODULE [ARGUMENT ...]`.

It counts the caches of streams, which are nearly all that a stream allocates.
"""

import runpy
import sys
import weakref
from typing import Any
from unittest.mock import patch

import torch

from avatar.denoiser.cache import KVCache


class CappedAllocator:
    """Counts the bytes of all caches that live. Over the cap, it refuses one as torch does on a GPU."""

    def __init__(self, cap: float) -> None:
        self.cap = cap
        self.allocated = 0

    def installed(self) -> Any:
        """Return a patch under which each new cache is allocated here."""
        initialise = KVCache.__init__

        def capped(cache: KVCache, *arguments: Any, **options: Any) -> None:
            initialise(cache, *arguments, **options)
            if options.get("device") != "meta":
                self._allocate(cache)

        return patch.object(KVCache, "__init__", capped)

    def _allocate(self, cache: KVCache) -> None:
        num_bytes = cache.num_bytes
        if self.allocated + num_bytes > self.cap:
            raise torch.OutOfMemoryError(f"CUDA out of memory. Tried to allocate {num_bytes} bytes")
        self.allocated += num_bytes
        weakref.finalize(cache, self._free, num_bytes)

    def _free(self, num_bytes: int) -> None:
        self.allocated -= num_bytes


def main() -> None:
    """Run a module as a program whose caches have at most so many bytes."""
    cap, module, *arguments = sys.argv[1:]
    sys.argv = [module, *arguments]
    with CappedAllocator(int(cap)).installed():
        runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
