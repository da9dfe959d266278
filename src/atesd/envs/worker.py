"""A process that plays episodes of a library's environment: started by `remote.py`, one request a line, in JSON.

The first line names the session and its settings: `["atesd.envs.textworld:Session", {...}]`. Then `[episode, ask,
given]`: `reset` opens an episode, given its row and seed; `step` takes a reply; `reward`; `close`. Each is answered by
`{"given": ..., "invalid": n}`, `{"failed": "raised ..."}` or, where the recipe is wrong, `{"wrong": "..."}`. A session
does what `remote.Session` says.
"""

from __future__ import annotations

import json
import os
import sys
from importlib import import_module
from typing import Any

from atesd.types import UserError


def main() -> None:
    """Serve until standard input closes."""
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever a library prints must not be taken for a reply
    place, settings = json.loads(sys.stdin.readline())
    open_sessions: dict[int, Any] = {}
    for line in sys.stdin:
        number, ask, given = json.loads(line)
        try:
            reply = _answered(open_sessions, place, settings, number, ask, given)
        except UserError as error:
            reply = {"wrong": str(error)}
        except Exception as error:  # a library's, or the user's own: the parent counts it
            reply = {"failed": f"it raised {type(error).__name__}: {' '.join(str(error).split())[:160]}"}
        print(json.dumps(reply), file=replies, flush=True)


def _answered(
    open_sessions: dict[int, Any], place: str, settings: dict[str, Any], number: int, ask: str, given: Any
) -> dict[str, Any]:
    if ask == "reset":
        module, _, name = place.partition(":")
        open_sessions[number] = getattr(import_module(module), name)(settings)
        return _said(open_sessions[number].reset(given["row"], given["seed"]), open_sessions[number])
    session = open_sessions[number]
    if ask == "close":
        del open_sessions[number]
        getattr(session, "close", lambda: None)()
        return {}
    if ask == "reward":
        reward = session.reward()
        return {"given": None if reward is None else float(reward)}
    return _said(session.step(given), session)


def _said(said: object, session: Any) -> dict[str, Any]:
    """Return what a session said: text, or None where it is over."""
    if said is not None and not isinstance(said, str):
        return {"not_text": f"it says {type(said).__name__} {' '.join(repr(said).split())[:60]}, which is no text"}
    return {"given": said, "invalid": int(getattr(session, "invalid", 0))}


if __name__ == "__main__":
    main()
