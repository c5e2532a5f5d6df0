"""Laws of a search's course: early stopping is asynchronous halving, what ended is never run again, and a search that was
cut off anywhere is the one that was not."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
from ray.tune.schedulers.async_hyperband import _Bracket  # an independent implementation of the rule
from scipy import sparse

import perturbray as pr
from perturbray.course import Course, SearchError
from perturbray.data.splits import TEST, TRAIN, VAL
from perturbray.data.store import ingest
from perturbray.data.truth import observe
from perturbray.errors import InputError
from perturbray.plan import Plan
from perturbray.results import ledger
from perturbray.search import Halving, Objective, Search
from perturbray.space import Choice, LogUniform
from perturbray.trial import run
from perturbray.validation import OBJECTIVE, Judge, alone

EPOCHS = 20
BASE = pr.Trial(
    dataset=pr.DatasetSpec(path="screen.h5ad"), model=pr.LatentAdditive(), training=pr.Training(epochs=EPOCHS)
)
SPACE = {"model.width": Choice(8, 16, 32), "training.lr": LogUniform(1e-4, 1e-1)}
METRICS = {"rmse/average": 0.0, "rmse/average/rank": 0.0}


class Killed(BaseException):
    """As a signal would: nothing in the course catches it."""


def search(**fields) -> Search:
    return Search(base=BASE, space=SPACE, **{"samples": 30, "startup": 20, **fields})


def loss(values, epoch: int) -> float:
    return abs(math.log10(values["training.lr"]) + 3) + 8 / values["model.width"] + 3 / epoch


def work(values, report, *, ran=None, kill=None):
    """A trial whose curve is known. ``kill``: (how many trials ran, epoch) at which all ends."""
    if ran is not None:
        ran.append(values)
    for epoch in range(1, EPOCHS + 1):
        if kill == (len(ran or ()), epoch):
            raise Killed
        if report(epoch, {OBJECTIVE: loss(values, epoch), **METRICS}):
            return None
    return {OBJECTIVE: loss(values, EPOCHS), "epochs": EPOCHS, **METRICS}


def told(course: Course) -> list[dict]:
    """Records without what differs from run to run."""
    return [{k: v for k, v in record.items() if k not in ("seconds", "started", "ended")} for record in course.done]


def test_a_course_stops_those_trials_that_asynchronous_halving_stops(tmp_path):
    rng = np.random.default_rng(0)
    course = Course(search(halving=Halving(first=2, factor=3), samples=60, way="random"), tmp_path, "")
    bracket = _Bracket(min_t=2, max_t=EPOCHS - 1, reduction_factor=3, s=0)
    assert sorted(rung for rung, _ in bracket._rungs) == [2, 6, 18]

    class Trial:
        def __init__(self, trial_id):
            self.trial_id = trial_id

    def one(values, report):
        offset, name = rng.normal(), Trial(len(course.records))
        for epoch in range(1, EPOCHS + 1):
            value = offset + rng.normal() / epoch
            oracle = bracket.on_result(name, epoch, -value) == "STOP"
            assert report(epoch, {OBJECTIVE: value, **METRICS}) == oracle
            if oracle:
                return None
        return {OBJECTIVE: value, "epochs": EPOCHS, **METRICS}

    course.run(one)
    ended = {state: sum(record["state"] == state for record in course.done) for state in ("finished", "stopped")}
    assert ended["stopped"] > ended["finished"] > 0


@pytest.mark.parametrize("kill", [(1, 1), (1, 7), (9, 1), (17, 2), (30, 1)])
def test_a_search_that_was_killed_goes_on_as_if_nothing_had_been(kill, tmp_path):
    whole = Course(search(), tmp_path / "whole", "")
    best = whole.run(work)

    ran: list[dict] = []
    with pytest.raises(Killed):
        Course(search(), tmp_path / "cut", "").run(lambda values, report: work(values, report, ran=ran, kill=kill))
    before = set(ledger.read_records(next((tmp_path / "cut").iterdir())))
    assert len(before) == kill[0] - 1

    again = Course(search(), tmp_path / "cut", "")
    assert set(again.records) == before
    rest: list[dict] = []
    assert again.run(lambda values, report: work(values, report, ran=rest))["key"] == best["key"]
    assert told(again) == told(whole)
    assert len(rest) == 30 - len(before), "nothing that ended is run again"


def test_two_searches_with_one_seed_try_the_same_and_another_seed_others(tmp_path):
    first, second, other = (Course(search(seed=seed), tmp_path / str(n), "") for n, seed in enumerate((4, 4, 5)))
    for course in (first, second, other):
        course.run(work)
    assert told(first) == told(second)
    assert [record["values"] for record in other.done] != [record["values"] for record in first.done]


def test_more_samples_go_on_where_fewer_ended(tmp_path):
    few, whole = Course(search(samples=11), tmp_path / "a", ""), Course(search(), tmp_path / "b", "")
    few.run(work), whole.run(work)
    more = Course(search(), tmp_path / "a", "")
    assert more.folder == few.folder
    more.run(work)
    assert told(more) == told(whole)


def test_what_fails_is_recorded_with_its_reason_and_does_not_end_the_search(tmp_path):
    def fails(values, report):
        if values["model.width"] == 8:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")
        if values["training.lr"] > 0.003:
            return {OBJECTIVE: math.nan, "epochs": 3, **METRICS}
        return work(values, report)

    course = Course(search(max_failed=30), tmp_path, "")
    best = course.run(fails)
    assert best["values"]["model.width"] != 8
    reasons = {record["reason"].split(":")[0] for record in course.failed}
    assert reasons == {"out of memory", "its objective is nan"}
    assert len(course.done) == 30
    json.dumps(course.done, allow_nan=False)


def test_a_search_ends_by_itself_when_too_many_fail(tmp_path):
    def fails(values, report):
        raise ZeroDivisionError("no luck")

    course = Course(search(max_failed=4), tmp_path, "")
    with pytest.raises(SearchError, match=r"4 of 4 trials failed.*trial 0: ZeroDivisionError: no luck"):
        course.run(fails)
    with pytest.raises(SearchError, match="4 of 4"):
        Course(search(max_failed=4), tmp_path, "").run(fails)
    more = Course(search(max_failed=20), tmp_path, "")
    more.run(work)
    assert len(more.done) == 30, "with a higher limit it goes on"


def test_points_to_try_first_are_tried_first_in_their_order_once(tmp_path):
    first = ({"model.width": 32, "training.lr": 0.05}, {"model.width": 999, "training.lr": 1e-3})
    course = Course(search(first=first, samples=8), tmp_path, "")
    course.run(work)
    assert [record["values"] for record in course.done[:2]] == list(first)
    assert [record["way"] for record in course.done] == ["first"] * 2 + ["tpe"] * 6


def test_trials_at_once_never_share_a_configuration_and_a_lost_one_frees_its_number(tmp_path):
    course = Course(search(samples=9), tmp_path, "")
    running = {name: course.begin(name) for name in "abcd"}
    assert len({json.dumps(values) for values in running.values()}) == 4
    course.end("c", final=work(running["c"], lambda *_: False))
    course.lose("b")
    lost = course.begin("e")
    assert course.running["e"].number == 1
    assert lost is not None
    for name in list(course.running):
        course.end(name, final=work(course.running[name].values, lambda *_: False))
    assert sorted(record["number"] for record in course.done) == [0, 1, 2, 3]


def test_a_search_with_no_time_left_stops_what_runs_and_proposes_nothing(tmp_path):
    course = Course(search(seconds=1e-9), tmp_path, "")
    assert course.begin("a") is None
    with pytest.raises(SearchError, match="no trial came to an end"):
        course.close()


def test_a_trial_over_its_time_keeps_what_it_has(tmp_path):
    course = Course(search(trial_seconds=5.0), tmp_path, "")
    course.begin("a")
    assert not course.report("a", epoch=1, values={OBJECTIVE: 2.0, **METRICS}, seconds=4.0)
    assert course.report("a", epoch=2, values={OBJECTIVE: 1.0, **METRICS}, seconds=6.0)
    record = course.end("a")
    assert (record["state"], record["reason"], record[OBJECTIVE]) == ("stopped", "time limit of a trial", 1.0)


def test_an_epoch_that_a_restarted_trial_says_again_changes_nothing(tmp_path):
    course = Course(search(), tmp_path, "")
    course.begin("a")
    for epoch in (1, 2, 3, 2, 3, 4):
        course.report("a", epoch=epoch, values={OBJECTIVE: 1.0 / epoch, **METRICS})
    assert course.end("a")["history"] == [[n, 1.0 / n] for n in (1, 2, 3, 4)]


# on a screen


@pytest.fixture(scope="module")
def lab(small_screen, tmp_path_factory):
    return Lab(small_screen, tmp_path_factory)


class Lab:
    """Searches on a screen, in this process."""

    def __init__(self, path, folders):
        self.path, self.folders = path, folders

    def course(self, path=None, **fields) -> Course:
        spec = pr.DatasetSpec(path=str(path or self.path), name="screen")
        base = pr.Trial(dataset=spec, model=pr.LatentAdditive(), training=pr.Training(epochs=6))
        asked = Search(base=base, space=SPACE, **{"samples": 6, "startup": 3, **fields})
        plan = Plan.of(pr.Sweep(name="x", trials=[base]), self.folders.mktemp("plan"))
        cells, conditions = ingest(spec, plan.conditions[spec]).cells(), plan.conditions[spec]
        judge = Judge.of(asked, cells, conditions)
        course = Course(asked, self.folders.mktemp("search"), "")
        course.run(alone(asked, judge, cells, conditions))
        return course


def test_what_a_trial_is_worth_in_the_end_is_what_it_said_last(lab):
    course = lab.course()
    ended = [record for record in course.done if record["state"] == "finished"]
    assert len(ended) >= 2
    for record in ended:
        assert record["history"][-1] == [record["epochs"], record[OBJECTIVE]]


def test_a_search_never_sees_the_test_cells(lab, own_screen):
    """Their genes are shuffled within each cell, so that depths and with them the normalisation stay."""
    import anndata as ad

    spec = pr.DatasetSpec(path=str(own_screen))
    split = pr.CovariateTransfer().split(spec.conditions())
    screen = ad.read_h5ad(own_screen)
    test = np.flatnonzero(split.cell == TEST)
    assert len(test) > 100
    dense = screen.X.toarray()
    dense[test] = np.random.default_rng(0).permuted(dense[test], axis=1)
    screen.X = sparse.csr_matrix(dense)
    screen.write_h5ad(own_screen)
    assert told(lab.course(own_screen)) == told(lab.course())


def test_looking_at_the_validation_conditions_changes_nothing_of_the_training(lab):
    """With a look at every third epoch, trials end with the same weights, and so with the same worth."""
    often, seldom = (lab.course(every=every, halving=None, way="random") for every in (1, 3))
    assert [r[OBJECTIVE] for r in often.done] == [r[OBJECTIVE] for r in seldom.done]
    assert all([epoch for epoch, _ in r["history"]] == [3, 6] for r in seldom.done)


def test_a_scaled_objective_is_a_share_of_what_the_mean_shift_has(lab):
    plain, scaled = (
        lab.course(objective=Objective.parse("rmse/average", scaled=scaled), samples=3, halving=None, way="random")
        for scaled in (False, True)
    )
    shares = [one[OBJECTIVE] / other[OBJECTIVE] for one, other in zip(plain.done, scaled.done, strict=True)]
    trial = replace(plain.search.base, model=pr.MeanShift())
    conditions = trial.dataset.conditions()
    cells = ingest(trial.dataset, conditions).cells()
    split = trial.make_split(conditions)
    truth = observe(cells, conditions, split, subset=VAL)
    prediction = run(trial, cells, conditions, truth=truth).prediction
    errors = np.sqrt(((prediction.predicted.mean - prediction.observed.mean) ** 2).mean(axis=1))
    contexts = [errors[prediction.context == context].mean() for context in np.unique(prediction.context)]
    assert shares == pytest.approx([np.mean(contexts)] * 3)


def test_a_split_without_validation_conditions_is_refused(small_screen):
    spec = pr.DatasetSpec(path=str(small_screen))
    conditions = spec.conditions()

    class Whole(pr.CovariateTransfer):
        def split(self, conditions):
            found = super().split(conditions)
            found.condition[found.condition == VAL] = TRAIN
            return found

    base = pr.Trial(dataset=spec, model=pr.LatentAdditive(), split=Whole())
    with pytest.raises(InputError, match="no validation condition"):
        Judge.of(Search(base=base, space=SPACE), None, conditions)
