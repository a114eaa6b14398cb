"""The registry of a cell: each worker writes its state, and gateways read all states in one call.

    avatar:workers:{CELL}       hash        STAGE/ADDRESS of a worker -> its state, as a serialized WorkerStates of one
    avatar:workers-seen:{CELL}  sorted set  STAGE/ADDRESS -> time of its last write, in milliseconds since 1970
    avatar:drained:{CELL}       string      `drained` while the cell's gateways open no new streams, `open` after it; a
                                            cell that was never drained has none

A process that serves several stages at one address is a worker of each. A state that was not written again within
STALE_S is gone: the next read deletes it, and one without such a time, too.
"""

import logging
from collections.abc import Iterable

from google.protobuf.message import DecodeError

from avatar.store.claims import key
from avatar.store.redis import RedisHashes, to_ms
from avatar.worker.v1.discovery_pb2 import WorkerState, WorkerStates

logger = logging.getLogger(__name__)

# One and a half heartbeats of a worker. A late write removes its state until the next one: gateways then keep what they
# have, and ask the worker after another heartbeat.
STALE_S = 1.2
# A cell without workers leaves nothing behind.
CELL_TTL_S = 60.0
# A line of the log names this many skipped entries, by so many characters of each.
MAX_NAMES = 5
MAX_NAME_CHARS = 100

# KEYS of every script: the states, the times of their last writes.

# ARGV: CELL_TTL_S in milliseconds; names of entries and states.
_WRITE = """
for i = 2, #ARGV, 2 do
    redis.call('HSET', KEYS[1], ARGV[i], ARGV[i + 1])
    redis.call('ZADD', KEYS[2], now, ARGV[i])
end
redis.call('PEXPIRE', KEYS[1], ARGV[1])
redis.call('PEXPIRE', KEYS[2], ARGV[1])
"""
_REMOVE = "redis.call('HDEL', KEYS[1], ARGV[1]) redis.call('ZREM', KEYS[2], ARGV[1])"
# ARGV[1]: STALE_S in milliseconds.
_READ = """
for _, name in ipairs(redis.call('ZRANGEBYSCORE', KEYS[2], '-inf', now - ARGV[1])) do
    redis.call('HDEL', KEYS[1], name)
    redis.call('ZREM', KEYS[2], name)
end
if redis.call('HLEN', KEYS[1]) ~= redis.call('ZCARD', KEYS[2]) then
    for _, name in ipairs(redis.call('HKEYS', KEYS[1])) do
        if not redis.call('ZSCORE', KEYS[2], name) then
            redis.call('HDEL', KEYS[1], name)
        end
    end
end
return {redis.call('HLEN', KEYS[1]), table.concat(redis.call('HVALS', KEYS[1]))}
"""
_READ_EACH = "return redis.call('HGETALL', KEYS[1])"
# ARGV[1]: DRAINED or OPEN.
_MARK = "redis.call('SET', KEYS[1], ARGV[1])"
# ARGV[1]: DRAINED. Only a store that lost its data has no mark of a cell that was drained: the end of a drain leaves
# OPEN, which this does not replace.
_KEEP_DRAINED = "redis.call('SET', KEYS[1], ARGV[1], 'NX') return redis.call('GET', KEYS[1])"
_READ_MARK = "return redis.call('GET', KEYS[1])"
DRAINED, OPEN = b"drained", b"open"


class WorkerRegistry:
    """The states of one cell's workers, and whether the cell is drained.

    Every method raises StoreUnavailable, and leaves it to its caller to log that.
    """

    def __init__(self, hashes: RedisHashes, cell: str) -> None:
        self._hashes = hashes
        self._keys = [key("workers", cell), key("workers-seen", cell)]
        self._drained = [key("drained", cell)]
        self._skipped: set[bytes] = set()

    async def write(self, *workers: WorkerState) -> None:
        """Write the states of workers: each is the only one of its stage at its address."""
        args: list[str | bytes | int] = [to_ms(CELL_TTL_S)]
        for worker in workers:
            args += f"{worker.WhichOneof('info')}/{worker.address}", WorkerStates(workers=[worker]).SerializeToString()
        await self._hashes.run(_WRITE, self._keys, args, is_logged=False)

    async def remove(self, stage: str, address: str) -> None:
        """Remove the state of a stage's worker at this address. stage: field of WorkerState."""
        await self._hashes.run(_REMOVE, self._keys, [f"{stage}/{address}"], is_logged=False)

    async def set_drained(self, *, is_drained: bool) -> None:
        """Drain the cell, or end its drain."""
        await self._hashes.run(_MARK, self._drained, [DRAINED if is_drained else OPEN])

    async def is_drained(self, *, was_drained: bool = False) -> bool:
        """Return whether the cell is drained.

        was_drained: as of the caller's last read. A store that lost its data since then gets the mark again.
        """
        script, flags = (_KEEP_DRAINED, "allow-oom") if was_drained else (_READ_MARK, "no-writes")
        mark = await self._hashes.run(script, self._drained, [DRAINED], flags=flags, is_logged=False)
        return bool(mark == DRAINED)

    async def read(self) -> WorkerStates:
        """Return the states of all workers that have written theirs lately.

        An entry that is not the state of one worker is skipped; the log has one line when the skipped ones change.
        """
        num_entries, joined = await self._hashes.run(_READ, self._keys, [to_ms(STALE_S)], is_logged=False)
        # Serialized messages of one type, joined, are the message of all their repeated fields. An entry that is cut
        # short may take the start of the next one for its own, so that fewer workers are found.
        states, skipped = _parsed(joined), set[bytes]()
        if states is None or len(states.workers) != num_entries:
            entries = await self._hashes.run(_READ_EACH, self._keys, [], flags="no-writes", is_logged=False)
            states = WorkerStates()
            for name, serialized in zip(entries[::2], entries[1::2], strict=True):
                state = _parsed(serialized)
                if state is None or len(state.workers) != 1:
                    skipped.add(name)
                else:
                    states.MergeFrom(state)
        if skipped != self._skipped:
            self._skipped = skipped
            if skipped:
                extra = {"number": len(skipped), "entries": _names(skipped)}
                logger.warning("registry entries skipped that are no worker's state", extra=extra)
            else:
                logger.info("no registry entries skipped any more")
        return states


def _parsed(serialized: bytes) -> WorkerStates | None:
    """Return the states of a serialized message, None if it cannot be parsed."""
    try:
        return WorkerStates.FromString(serialized)
    except DecodeError:
        return None


def _names(entries: Iterable[bytes]) -> list[str]:
    """Return the names of the first entries for the log; they may be any bytes."""
    return [name.decode(errors="backslashreplace")[:MAX_NAME_CHARS] for name in sorted(entries)[:MAX_NAMES]]
