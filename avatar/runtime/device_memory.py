"""Memory of a device, and what its streams reserve of it."""

import math
import threading
import weakref
from collections.abc import Callable


class Reservation:
    """Memory of a device for one stream, reserved for as long as something refers to this object."""

    def __init__(self, num_bytes: int) -> None:
        self.num_bytes = num_bytes

    def keep_for(self, state: object) -> None:
        """Keep the memory reserved until the stream's state is freed: a step that runs outlives its stream."""
        weakref.finalize(state, lambda _: None, self)


class DeviceMemory:
    """Memory of a device for its streams, in bytes.

    reserved_bytes: of the open streams, and of states that are not freed yet.
    """

    def __init__(self, measure: Callable[[], float] = lambda: math.inf) -> None:
        """measure: returns the bytes that streams may take, called while there are none; by default no limit."""
        self.reserved_bytes = 0
        self._measure = measure
        self._limit_bytes = math.inf
        self._lock = threading.RLock()  # a state may be freed by any thread

    @property
    def free_bytes(self) -> float:
        """Bytes that are not reserved."""
        if not self.reserved_bytes:  # other services of the device may have loaded their weights since
            self._limit_bytes = self._measure()
        return self._limit_bytes - self.reserved_bytes

    def reserve(self, num_bytes: int) -> Reservation:
        """Reserve memory, of which the caller has read `free_bytes`: a second measurement may differ."""
        reservation = Reservation(num_bytes)
        self._add(num_bytes)
        weakref.finalize(reservation, self._add, -num_bytes)
        return reservation

    def _add(self, num_bytes: int) -> None:
        with self._lock:
            self.reserved_bytes += num_bytes
