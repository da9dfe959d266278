"""A port that stays one's own while nobody listens there."""

from __future__ import annotations

import socket


def held_port() -> tuple[socket.socket, int]:
    """Return a socket that holds a port of 127.0.0.1 until it is closed, and the port.

    Whoever sets SO_REUSEADDR, as servers do, may listen there. Nobody is given it by the system, for a server or as the
    near end of a connection, and a connection to it is refused while no server is there.
    """
    held = socket.socket()
    held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    held.bind(("127.0.0.1", 0))
    return held, held.getsockname()[1]
