"""Ends every process of a run when one of them dies, with one line that says which.

A collective operation does not say who is missing: gloo's error names no rank, and NCCL waits for
its timeout. Here every process keeps a connection to rank 0. The kernel closes it when the process
dies, however it dies, and rank 0 tells the others. A machine that vanishes is noticed by its
silence.
"""

import atexit
import os
import secrets
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import torch.distributed as dist

from fastvit_mm.errors import FastViTError, one_line

BEAT, DONE = b'.', 'done'
GREETING = 30  # seconds to wait for the others in the beginning
watches: list['Watch'] = []


class Watch:
    """Listens to other processes, each of which sends a dot from time to time and, at the end, its
    last words.

    Args:
        rank: of this process.
        peers: connections to other ranks.
        patience: seconds of silence after which a rank counts as dead.
    """

    def __init__(self, rank: int, peers: dict[int, socket.socket], patience: float):
        self.rank, self.peers, self.patience = rank, peers, patience
        self.over = threading.Lock()
        for other, peer in peers.items():
            threading.Thread(target=self.listen, args=(other, peer), daemon=True).start()
        threading.Thread(target=self.beat, daemon=True).start()
        os.register_at_fork(after_in_child=self.forget)  # data loaders would keep them open
        atexit.register(self.say, DONE)

    def beat(self) -> None:
        while True:
            time.sleep(self.patience / 8)
            for peer in self.peers.values():
                with suppress(OSError):
                    peer.sendall(BEAT)

    def listen(self, other: int, peer: socket.socket) -> None:
        """Wait for the end of rank ``other``."""
        said, silent = b'', 0
        peer.settimeout(self.patience / 4)
        try:
            while silent < 4:  # counted: one that was suspended itself has missed only one
                try:
                    data = peer.recv(4096)
                except TimeoutError:
                    silent += 1
                    continue
                if not data:
                    break
                said, silent = said + data.lstrip(BEAT) if not said else said + data, 0
        except OSError:
            pass
        words = said.decode(errors='replace').rstrip('.')  # a beat came in between
        if silent == 4:
            words = f'rank {other} has been silent for {self.patience:.0f} s: is its machine gone?'
        elif not words:
            words = f'rank {other} died without a word: killed, or out of memory?'
        if words != DONE:
            self.end(f'{words} (rank {self.rank} ends, too)')

    def end(self, words: str) -> None:
        """End this process because of another one."""
        if not self.over.acquire(blocking=False):
            return  # it is ending already
        self.say(words.partition(' (rank')[0])
        sys.stdout.flush()
        print(f'error: {words}', file=sys.stderr, flush=True)
        os._exit(1)

    def fail(self, error: Exception) -> None:
        """End because of an error in this process, unless it follows from another's death.

        A FastViTError does not; where all ranks have agreed on one, each says its own.
        """
        own = isinstance(error, FastViTError) and self.over.acquire(blocking=False)
        time.sleep(2)
        if not own and not self.over.acquire(blocking=False):
            time.sleep(60)  # the other thread is ending this process
        self.say(f'rank {self.rank} failed: {one_line(error)}')

    def say(self, words: str) -> None:
        """Tell the others this process's last words."""
        for peer in self.peers.values():
            with suppress(OSError):
                peer.sendall(words.encode())
                peer.shutdown(socket.SHUT_WR)

    def forget(self) -> None:
        for peer in self.peers.values():
            peer.close()


def start(patience: float) -> None:
    """Begin to watch the other processes of the process group; all ranks call this.

    Args:
        patience: seconds of silence after which a process counts as dead.
    """
    rank, size = dist.get_rank(), dist.get_world_size()
    if size == 1:
        return
    server = socket.create_server(('', 0), backlog=size) if rank == 0 else None
    place = [server and server.getsockname()[1], secrets.token_hex(16)]
    place = [os.environ.get('MASTER_ADDR', 'localhost'), *place]
    dist.broadcast_object_list(place)
    peers = greet(server, size, place[2]) if rank == 0 else call(*place, rank)
    watches.append(Watch(rank, peers, patience))


def greet(server: socket.socket, size: int, token: str) -> dict[int, socket.socket]:
    """On rank 0: the connections of the others; those that cannot call are not watched."""
    peers, deadline = {}, time.monotonic() + GREETING
    with server, suppress(OSError):
        while len(peers) < size - 1:
            server.settimeout(max(deadline - time.monotonic(), 0.1))
            peer, _ = server.accept()
            peer.settimeout(GREETING)
            said, _, other = peer.makefile().readline().partition(' ')
            if said == token:
                peers[int(other)] = peer
    return peers


def call(host: str, port: int, token: str, rank: int) -> dict[int, socket.socket]:
    """On another rank: the connection to rank 0, if there can be one."""
    try:
        peer = socket.create_connection((host, port), timeout=GREETING)
        peer.sendall(f'{token} {rank}\n'.encode())
        return {0: peer}
    except OSError as error:
        print(f'rank {rank} cannot be watched by rank 0: {error}', file=sys.stderr)
        return {}


@contextmanager
def one_fate() -> Iterator[None]:
    """An error or Ctrl-C within it ends the other processes of the run as well, which otherwise
    wait."""
    try:
        yield
    except KeyboardInterrupt:
        for watch in watches:
            if watch.over.acquire(blocking=False):
                watch.say(f'rank {watch.rank} was interrupted')
        raise
    except Exception as error:
        for watch in watches:
            watch.fail(error)
        raise
