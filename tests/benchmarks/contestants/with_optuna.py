"""Optuna as a process that is asked for configurations and told what they are worth, a JSON object a line.

First line in: the space, a seed, whether TPE is multivariate, whether the median pruner is on.
"""

import json
import sys

import optuna

optuna.logging.set_verbosity(optuna.logging.ERROR)


def distribution(part: dict):
    if "values" in part:
        return optuna.distributions.CategoricalDistribution(part["values"])
    return optuna.distributions.FloatDistribution(part["low"], part["high"], log="Log" in part["kind"])


def answer(found: object) -> None:
    print(json.dumps(found), flush=True)


def main() -> None:
    asked = json.loads(sys.stdin.readline())
    space = {path: distribution(part) for path, part in asked["space"].items()}
    import warnings

    warnings.simplefilter("ignore")  # multivariate TPE says that it is experimental
    sampler = optuna.samplers.TPESampler(seed=asked["seed"], multivariate=asked["multivariate"])
    pruner = optuna.pruners.MedianPruner() if asked["pruning"] else optuna.pruners.NopPruner()
    study = optuna.create_study(direction="minimize", sampler=sampler, pruner=pruner)
    trial = None
    for line in sys.stdin:
        word, *values = json.loads(line)
        if word == "ask":
            trial = study.ask(space)
            answer(trial.params)
        elif word == "report":
            epoch, value = values
            trial.report(value, epoch)
            answer(bool(trial.should_prune()))
        elif word == "tell":
            (value,) = values
            state = optuna.trial.TrialState.PRUNED if value is None else optuna.trial.TrialState.COMPLETE
            study.tell(trial, value, state=state)
            answer(True)


main()
