"""What whoever runs a sweep says of it: ``live.json`` as a driver writes it."""

import time
from pathlib import Path

from perturbray.results import live


def say(folder: Path, runs=(), **fields) -> live.Live:
    """Write what a driver would say now; ``runs``: keys, or Runs by key."""
    now = time.time()
    runs = runs if isinstance(runs, dict) else {key: live.Run(since=now - 5) for key in runs}
    said = live.Live(**{"time": now, "began": now - 60, "host": "node-1", "pid": 7, "runs": runs, **fields})
    live.write(folder, live.text(said))
    return said
