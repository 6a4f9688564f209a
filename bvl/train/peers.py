"""Signs of life between the hosts of a run: one that dies, hangs or fails ends the others, which name it.

Every host counts up a number of its own in the key-value store of `jax.distributed`, which needs no device; the first
host, where the store is, looks for numbers that stand still, and the others look at the first host's. JAX has
heartbeats too, but what they print names nobody, and a collective that waits for a dead host never returns. Where the
first host dies JAX aborts the others within a second; its abort is caught here, to say why.

Those who lost another end with EXIT_PEER_LOST; where a host says why it stops, all end with its code.
"""

from __future__ import annotations

import ctypes
import json
import logging
import os
import signal
import threading
import time
from typing import Any

import jax

from bvl import hosts
from bvl.errors import UserError
from bvl.train.survive import EXIT_INTERRUPTED, EXIT_PEER_LOST

logger = logging.getLogger("bvl.hosts")

# The longest time between signs of life, and how many may be missing once a collective has failed.
BEAT_S, MISSING = 5.0, 3
# How long the own end may take after an error; JAX would wait minutes for the others at its exit.
EXIT_WITHIN_S = 10.0
ALIVE, STOPPED = "bvl/alive", "bvl/stopped"
DONE = "done"


class Peers:
    """Watches the other hosts while it is open; does nothing for a process on its own.

    timeout_s: a host that gives no sign of life for so long counts as dead.
    """

    def __init__(self, timeout_s: float):
        self._timeout, self._limit = timeout_s, timeout_s
        self._beat = min(BEAT_S, timeout_s / 10)
        self._closed, self._ending = threading.Event(), threading.Lock()
        self._others = hosts.count() > 1
        if not self._others:
            return
        self._client = hosts.client()
        self._names: list[str] = hosts.gather(hosts.describe())
        now = time.monotonic()
        watched = range(1, hosts.count()) if hosts.is_first() else [0]
        self._seen = {host: ("", now) for host in watched}
        self._threads = [threading.Thread(target=t, daemon=True) for t in (self._tell, self._judge)]
        for thread in self._threads:
            thread.start()
        # Python's own handlers run in the main thread, which an abort never gets back to. Kept, as C does not keep it.
        self._handler = ctypes.CFUNCTYPE(None, ctypes.c_int)(self._aborted)
        _handle_abort(self._handler)

    def close(self) -> None:
        """This host is done, and no longer watches."""
        if not self._others or self._closed.is_set():
            return
        self._closed.set()
        _handle_abort(None)
        for thread in self._threads:
            # It may hang in the store of a host that is gone.
            thread.join(2 * self._beat)
        _quietly(lambda: self._client.key_value_set(f"{ALIVE}/{hosts.index()}", DONE, True))

    def failed(self, error: BaseException) -> None:
        """Call it for an error that ends this host: tells the others, so that they need not wait.

        Where it is a collective that failed, a dead host is the likely reason, and this one is ended with its name.
        """
        if not self._others:
            return
        if isinstance(error, jax.errors.JaxRuntimeError) and "RESOURCE_EXHAUSTED" not in str(error):
            logger.error("%s: %s; looking for a host that died", hosts.describe(), _first_line(error))
            # Whoever still beats does so within seconds.
            self._limit = min(self._timeout, MISSING * self._beat + 1.0)
            time.sleep(self._limit + 2 * self._beat)
        code, why = 1, f"stopped: {_first_line(error)}"
        if isinstance(error, KeyboardInterrupt):
            code, why = EXIT_INTERRUPTED, "was interrupted"
        elif isinstance(error, SystemExit) and isinstance(error.code, int):
            code, why = error.code, "was asked to stop"
        _quietly(lambda: self._tell_end(hosts.index(), f"{hosts.describe()} {why}", code))
        self.close()
        timer = threading.Timer(EXIT_WITHIN_S, os._exit, args=(code,))
        timer.daemon = True
        timer.start()

    def _tell_end(self, host: int, what: str, code: int) -> None:
        self._client.key_value_set(f"{STOPPED}/{host}", json.dumps([what, code]), True)

    def _tell(self) -> None:
        """Signs of life to and from the store; a call may hang where the first host does."""
        for number in range(1, 1 << 62):
            _quietly(lambda n=number: self._client.key_value_set(f"{ALIVE}/{hosts.index()}", str(n), True))
            _quietly(self._look)
            if self._closed.wait(self._beat):
                return

    def _look(self) -> None:
        told = self._client.key_value_dir_get(STOPPED)
        if told and not self._closed.is_set():
            self._end(*json.loads(told[0][1]))
        now = time.monotonic()
        for key, value in self._client.key_value_dir_get(ALIVE):
            host = int(key.rsplit("/", 1)[-1])
            if host in self._seen and (value == DONE or value != self._seen[host][0]):
                self._seen[host] = value, now

    def _judge(self) -> None:
        while not self._closed.wait(self._beat / 2):
            now = time.monotonic()
            for host, (value, since) in self._seen.items():
                if value != DONE and now - since > self._limit:
                    what = (
                        f"{self._names[host]} has given no sign of life for {now - since:.0f} s "
                        f"(survive.host_timeout_s={self._timeout:g})"
                    )
                    if hosts.is_first():
                        _quietly(lambda h=host, w=what: self._tell_end(h, w, EXIT_PEER_LOST))
                    self._end(what, EXIT_PEER_LOST)

    def _aborted(self, _number: int) -> None:
        now = time.monotonic()
        silent = [host for host, (_, since) in self._seen.items() if now - since > 2 * self._beat]
        names = ", ".join(self._names[host] for host in silent or list(self._seen)[:1])
        # No logging: the main thread may hold its lock.
        text = (
            f"{names} has died, as far as {hosts.describe()} can tell, which was ended by JAX for it. The same command "
            f"goes on from the last checkpoint\n"
        )
        os.write(2, text.encode())
        os._exit(EXIT_PEER_LOST)

    def _end(self, what: str, code: int) -> None:
        if not self._ending.acquire(blocking=False):
            return
        logger.error(
            "%s; %s stops too. The same command goes on from the last checkpoint", what, hosts.describe()
        )
        if hosts.is_first():
            # The others read the reason from this host's store.
            time.sleep(2 * self._beat)
        # The main thread may hang in a collective, where no exception reaches it.
        os._exit(code)


def _handle_abort(handler: Any) -> None:
    """Let C call `handler` on SIGABRT, in whatever thread; None: as it was."""
    call = ctypes.CDLL(None).signal
    call.restype = ctypes.c_void_p
    call(int(signal.SIGABRT), handler if handler is not None else ctypes.c_void_p(0))


def _quietly(call: Any) -> None:
    """A store that is gone is told by the first host's missing signs of life."""
    try:
        call()
    except Exception as error:
        logger.debug("the store of the hosts: %s", error)


def _first_line(error: BaseException) -> str:
    text = str(error) or type(error).__name__
    return text if isinstance(error, UserError) else text.splitlines()[0][:300]
