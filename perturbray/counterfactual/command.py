"""The command `perturbray predict`: its flags, and what it does."""

import argparse
from pathlib import Path

from perturbray.errors import InputError


def add_predict(commands: argparse._SubParsersAction) -> None:
    """The `perturbray predict` command."""
    predict = commands.add_parser(
        "predict",
        help="predict conditions that nobody measured, with fitted models",
        description="Predicts from the control cells of a file what fitted models (RESULTS/<sweep>/models/*.pt of a sweep "
        "run with --keep-models) say of other conditions: cells of the conditions that a table asks for, as h5ad; or a "
        "ranked table of all pairs.",
    )
    predict.add_argument(
        "checkpoints", metavar="CHECKPOINT", nargs="+", help="several for --all-pairs: fits of other seeds"
    )
    predict.add_argument(
        "--controls", metavar="FILE.h5ad", required=True, help="control cells, of every context asked for"
    )
    what = predict.add_mutually_exclusive_group(required=True)
    what.add_argument(
        "--conditions",
        metavar="TABLE.csv",
        help="columns named as in the training data: the perturbation, and the covariates (without them: every context)",
    )
    what.add_argument(
        "--all-pairs",
        nargs="?",
        const="perturbations",
        choices=("perturbations", "contexts"),
        help="rank every pair of perturbations, or every perturbation in every context where it was not measured",
    )
    predict.add_argument(
        "--out", metavar="FILE", required=True, help="predicted.h5ad, or the ranked table as .csv or .parquet"
    )
    predict.add_argument(
        "--cells", metavar="N", type=int, default=200, help="control cells of a context (default: 200)"
    )
    predict.add_argument("--control", metavar="C", help="label of control cells in FILE.h5ad (default: as in training)")
    predict.add_argument(
        "--signature", metavar="FILE.csv", help="gene, value: rank by the similarity of effects with it"
    )
    predict.add_argument(
        "--rank-by",
        metavar="NAME",
        help="deviation from additivity (default), effect, similarity (default with --signature), or spread over seeds",
    )
    predict.add_argument(
        "--plugin", metavar="FILE.py", action="append", default=[], help="registers models of your own"
    )


def run(arguments: argparse.Namespace) -> int:
    """Check everything that can be checked before models are loaded, predict, write. Raises InputError."""
    out = Path(arguments.out)
    suffixes = (".h5ad",) if arguments.conditions else (".csv", ".parquet")
    if out.suffix not in suffixes:
        raise InputError(f"--out {out}: name a file that ends in {' or '.join(suffixes)}")
    if arguments.cells < 1:
        raise InputError(f"--cells {arguments.cells}: at least 1")
    if arguments.conditions and len(arguments.checkpoints) > 1:
        raise InputError("--conditions takes one CHECKPOINT; predictions of several are files of their own")
    if arguments.conditions and (arguments.signature or arguments.rank_by):
        raise InputError("--signature and --rank-by go with --all-pairs")

    from perturbray import plugin
    from perturbray.counterfactual import cells, ranking
    from perturbray.counterfactual.controls import Controls
    from perturbray.training.fitted import Fitted

    plugin.install(tuple(plugin.Plugin.read(path) for path in arguments.plugin))
    fitted = [Fitted.load(path) for path in arguments.checkpoints]
    controls = Controls.read(arguments.controls, fitted[0], most=arguments.cells, control=arguments.control)
    out.parent.mkdir(parents=True, exist_ok=True)
    if arguments.conditions:
        asked = cells.read_conditions(arguments.conditions, fitted[0], controls)
        number = cells.write_cells(fitted[0], controls, asked, out)
        print(f"{fitted[0].name}: {number:,} cells of {len(asked):,} conditions and their controls in {out}")
        return 0
    signature = None
    if arguments.signature:
        signature = ranking.read_signature(arguments.signature, fitted[0].conditions.genes)
    table = ranking.rank(fitted, controls, kind=arguments.all_pairs, signature=signature, by=arguments.rank_by)
    table.to_parquet(out) if out.suffix == ".parquet" else table.to_csv(out, index=False)
    print(table.head(10).to_string(index=False, float_format=lambda value: f"{value:.4f}"))
    print(f"{len(table):,} pairs of {len(fitted)} fitted model(s) in {out}")
    return 0
