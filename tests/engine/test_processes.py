"""Trials and the processes that run them."""

import small

SHORT = """
import os
import time
from dataclasses import dataclass
from pathlib import Path

import perturbray as pr

FOLDER = Path({folder!r})


@pr.MODELS.register("short")
@dataclass(frozen=True, kw_only=True)
class Short(pr.ModelSpec):
    def build(self, vocabulary):
        (FOLDER / str(os.getpid())).touch()
        if len(list(FOLDER.iterdir())) < 2:
            time.sleep(0.5)
        return ShortNet(vocabulary)


class ShortNet(pr.Model):
    def predict(self, batch):
        return batch.control
"""


def test_trials_shorter_than_the_start_of_a_process_are_not_left_to_a_single_one(ray_session, small_screen, tmp_path):
    import perturbray as pr

    processes = tmp_path / "processes"
    processes.mkdir()
    plugin = small.plugin(SHORT.format(folder=str(processes)), "short")
    sweep = small.sweep(small_screen, [pr.MODELS["short"]()], seeds=60)  # half a minute, if one runs them all
    ran, _ = small.run(sweep, tmp_path / "out", plugins=[plugin])
    assert ran == 60
    assert len(list(processes.iterdir())) == 2
