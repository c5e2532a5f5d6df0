"""A pickle that shows whether somebody opened it."""

import os
from pathlib import Path


class Marker:
    """Makes a folder where it is unpickled."""

    def __init__(self, place: Path) -> None:
        self.place = place

    def __reduce__(self):
        return os.mkdir, (str(self.place),)
