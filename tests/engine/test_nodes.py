"""A cluster of several nodes: what runs where, what a node must see and what it need not, and what can never come."""

import json
import textwrap

import pytest
import small
from nodes import can_hide, cluster
from pandas.testing import assert_frame_equal

import perturbray as pr
from perturbray.metrics.metric import Metric
from perturbray.results import table

# A model and a score that note on which node they work, and whether it sees the driver's files.
NOTING = """
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

import perturbray as pr
from perturbray.metrics import score


def note(folder, what):
    import ray
    import ray._private.state

    context = ray.get_runtime_context()
    title = Path("/proc/self/cmdline").read_text().strip("\\0")
    seen = [path for path in SECRET if Path(path).exists()]
    record = {"what": what, "node": context.get_node_id(), "sees": seen, "title": title}
    record["class"] = ray._private.state.actors(context.get_actor_id())["ActorClassName"]
    with open(Path(folder) / "notes.jsonl", "a") as file:
        file.write(json.dumps(record) + "\\n")


FOLDER, SECRET = %r, %r


@pr.MODELS.register("noting")
@dataclass(frozen=True, kw_only=True)
class Noting(pr.LatentAdditive):
    def build(self, vocabulary):
        note(FOLDER, "trial")
        return super().build(vocabulary)


@score("noting", best=0.0, higher_is_better=False)
def noting(predicted, observed):
    note(FOLDER, "scorer")
    return np.abs(predicted - observed).mean(axis=-1)
"""

DRIVER = textwrap.dedent("""
    import json, sys
    from pathlib import Path

    address, screen, folder, plugin, gpus = sys.argv[1:]
    import small
    import perturbray as pr
    from perturbray.engine import run_sweep
    from perturbray.errors import InputError
    from perturbray.metrics.metric import Metric
    from perturbray.plan import Plan
    from perturbray.plugin import Plugin

    plugins = (Plugin.read(plugin),)
    plugins[0].install()
    models = (pr.MeanShift(), pr.MODELS["noting"](width=8, latent_dim=4))
    sweep = small.sweep(screen, models, seeds=2, metrics=(*small.METRICS, Metric("noting")))
    record = small.Record()
    record.connected = lambda cluster, placement, folder: record.line(f"{cluster}: {placement}")
    try:
        run_sweep(Plan.of(sweep, Path(folder)), address=address, gpus=float(gpus), plugins=plugins, events=record)
    except InputError as error:
        record.lines.append(f"error: {error}")
    print(json.dumps(record.lines))
""")


def said(ended) -> list[str]:
    assert ended.returncode == 0, ended.stderr[-3000:]
    return json.loads(ended.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def head():
    with cluster() as found:
        yield found


@pytest.fixture(scope="module")
def folders(tmp_path_factory, small_screen):
    """What the nodes see, and what only the driver does: the data, the cache, and a folder for results."""
    folder = tmp_path_factory.mktemp("nodes")
    for name in ("open", "secret"):
        (folder / name).mkdir()
    (folder / "secret" / "small.h5ad").write_bytes(small_screen.read_bytes())
    source = NOTING % (str(folder / "open"), [str(folder / "secret" / "small.h5ad")])
    (folder / "secret" / "noting.py").write_text(source)
    return folder


def drive(head, folders, results, gpus=0.5):
    secret = folders / "secret"
    words = secret / "small.h5ad", results, secret / "noting.py", gpus
    return head.run(DRIVER, *words, PERTURBRAY_CACHE=str(secret / "cache"))


def test_a_cluster_of_a_head_alone_that_nothing_could_join_is_refused_at_once(head, folders):
    *_, last = said(drive(head, folders, folders / "open" / "refused"))
    assert "0 CPUs" in last
    assert "there: 1 node, 0 CPUs, 0 GPUs; no autoscaler could bring any" in last
    assert table.read_plan(folders / "open" / "refused")["status"]["state"] == "interrupted"


@pytest.fixture(scope="module")
def nodes(head, folders):
    if not can_hide():
        pytest.skip("this user may not mount: nodes cannot be made blind")
    head.add("cpu", cpus=2, hidden=[folders / "secret"])
    head.add("gpu", cpus=2, gpus=1, hidden=[folders / "secret"])
    return head


def test_nodes_that_do_not_see_the_drivers_files_give_the_numbers_of_one_machine(ray_session, nodes, folders):
    lines = said(drive(nodes, folders, folders / "open" / "small"))
    text = "3 nodes, 4 CPUs, 1 GPUs: 2 trials at once (1 CPU, 0.5 GPU each), 1 scorer (0.2 CPU each, on nodes without a GPU)"
    assert text in lines
    notes = [json.loads(line) for line in (folders / "open" / "notes.jsonl").read_text().splitlines()]
    where = {what: {note["node"] for note in notes if note["what"] == what} for what in ("trial", "scorer")}
    assert len(where["trial"]) == len(where["scorer"]) == 1
    assert where["trial"] != where["scorer"]
    assert not any(note["sees"] for note in notes), "the nodes were not blind, and nothing was tested"
    assert {note["class"] for note in notes} == {"trial small", "Scorer"}
    titles = {note["title"] for note in notes if note["what"] == "trial"}
    assert len(titles) == 2, "a person tells trials apart"
    assert all(title.startswith("ray::trial small noting") for title in titles)

    noting = small.plugin((folders / "secret" / "noting.py").read_text(), "noting")
    models = (pr.MeanShift(), pr.MODELS["noting"](width=8, latent_dim=4))
    sweep = small.sweep(folders / "secret" / "small.h5ad", models, seeds=2, metrics=(*small.METRICS, Metric("noting")))
    small.run(sweep, folders / "open" / "alone", plugins=[noting])
    found, alone = small.stable(folders / "open" / "small"), small.stable(folders / "open" / "alone")
    assert_frame_equal(found, alone, check_exact=True)


def test_results_that_a_node_does_not_see_are_refused_before_anything_runs(nodes, folders):
    *_, last = said(drive(nodes, folders, folders / "secret" / "small"))
    assert last.startswith("error: node ")
    assert last.count(f"does not see {folders / 'secret' / 'small'}") == 2
    assert "give --results a folder that every node sees" in last
    assert not list((folders / "secret" / "small").rglob("*.tmp*")), "the probe cleans up"
