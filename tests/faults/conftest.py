"""What tests of faults share with those of the engine."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1] / "engine"))  # small.py, nodes.py
