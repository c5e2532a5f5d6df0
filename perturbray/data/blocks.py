"""Blocks: the cells of a screen as CSR rows in Ray's object store, read from the file once for all trials of a sweep."""

import logging
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import ray
from ray.data.block import BlockMetadata
from ray.data.datasource import Datasource, ReadTask
from ray.exceptions import RayTaskError
from scipy import sparse

from perturbray.data import matrix
from perturbray.data.batches import Cells
from perturbray.data.dataset import Conditions, DatasetSpec, open_h5ad
from perturbray.errors import InputError

ROWS = 65536  # rows a block, 80 to 160 MB on a screen of 5,000 genes at 8 % density


@dataclass(frozen=True)
class Blocks:
    """References to Arrow tables in row order. Pickles small, so that every trial may hold it."""

    references: tuple[ray.ObjectRef, ...]
    genes: int

    def cells(self) -> Cells:
        """The rows, mapped from this node's object store without a copy."""
        return Cells([_rows(table, self.genes) for table in ray.get(list(self.references))])


class CellDatasource(Datasource):
    """Row ranges of an h5ad file, one read task and one block each, with what each row holds beside it."""

    def __init__(self, spec: DatasetSpec, *, genes: int, rows: int = ROWS) -> None:
        super().__init__()
        self.spec, self.genes = spec, genes
        with open_h5ad(spec.path) as file:
            self.ranges = matrix.row_ranges(spec, file, rows=rows)

    def get_name(self) -> str:
        return f"cells of {self.spec.name}"

    def estimate_inmemory_data_size(self) -> None:
        return None

    def get_read_tasks(self, parallelism, per_task_row_limit=None, data_context=None) -> list[ReadTask]:
        return [self._task(start, stop) for start, stop in self.ranges]

    def _task(self, start: int, stop: int) -> ReadTask:
        spec = self.spec  # a task closes over values, not over this object

        def read() -> Iterable[pa.Table]:
            with open_h5ad(spec.path) as file:
                rows = matrix.read_rows(file, spec, start, stop)
            yield _table(rows, matrix.row_facts(rows), start)

        return ReadTask(read, BlockMetadata(num_rows=stop - start, size_bytes=None, exec_stats=None))


def read(spec: DatasetSpec, conditions: Conditions, *, rows: int = ROWS) -> tuple[Blocks, matrix.MatrixFacts]:
    """Read, check and normalise a screen. One pass over the file, whatever the number of trials.

    Raises InputError for values that are not finite or of no known scale, before anything is trained.
    """
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)  # a line an execution otherwise, and what is raised twice
    context = ray.data.DataContext.get_current().copy()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.target_max_block_size = None  # a row range stays one block
    with ray.data.DataContext.current(context), _as_raised():
        source = CellDatasource(spec, genes=len(conditions.genes), rows=rows)
        raw = ray.data.read_datasource(source, override_num_blocks=len(source.ranges)).materialize()
        facts = _facts(raw, spec, conditions)
        normalisation = matrix.decide(spec, facts)
        ready = raw.map_batches(
            _normalise, batch_size=None, batch_format="pyarrow", fn_kwargs={"normalisation": normalisation}
        ).materialize()
    matrix.remember(spec, facts)
    references = tuple(reference for bundle in ready.iter_internal_ref_bundles() for reference in bundle.block_refs)
    return Blocks(references=_in_order(references), genes=len(conditions.genes)), facts


@contextmanager
def _as_raised() -> Iterator[None]:
    """An InputError of a read task as its one line, without the traceback and the advice that Ray adds."""
    try:
        yield
    except RayTaskError as error:
        if isinstance(error, InputError):
            raise InputError(str(error.cause).splitlines()[0]) from None
        raise


def _table(rows: sparse.csr_matrix, facts: matrix.RowFacts, start: int) -> pa.Table:
    n = rows.shape[0]
    digest: list[str | None] = [None] * n
    digest[:: matrix.DIGEST_ROWS] = matrix.digests(rows)
    offsets = pa.array(rows.indptr.astype(np.int64))
    return pa.table(
        {
            "row": np.arange(start, start + n, dtype=np.int64),
            "indices": pa.LargeListArray.from_arrays(offsets, pa.array(rows.indices.astype(np.int32, copy=False))),
            "values": pa.LargeListArray.from_arrays(offsets, pa.array(rows.data.astype(np.float32, copy=False))),
            "total": facts.total,
            "minimum": facts.minimum,
            "maximum": facts.maximum,
            "whole": facts.whole,
            "bad_gene": facts.bad_gene,
            "digest": pa.array(digest, type=pa.string()),
        }
    )


def _normalise(table: pa.Table, normalisation: matrix.Normalisation) -> pa.Table:
    rows = _rows(table, 2**31 - 1)
    totals = table["total"].to_numpy()
    values = normalisation.apply(rows.data, np.diff(rows.indptr), totals)
    offsets = pa.array(rows.indptr.astype(np.int64))
    columns = {"indices": pa.array(rows.indices), "values": pa.array(values)}
    lists = {name: pa.LargeListArray.from_arrays(offsets, flat) for name, flat in columns.items()}
    return pa.table({"row": table["row"], **lists})


def _rows(table: pa.Table, genes: int) -> sparse.csr_matrix:
    """An Arrow block as CSR over the same memory, where it has one chunk."""
    # combine_chunks copies a single chunk too, and every trial would hold a screen of its own.
    indices, values = (
        column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()
        for column in (table["indices"], table["values"])
    )
    indptr = indices.offsets.to_numpy()
    low, high = indptr[0], indptr[-1]
    return sparse.csr_matrix(
        (values.values.to_numpy()[low:high], indices.values.to_numpy()[low:high], indptr - low),
        shape=(len(indptr) - 1, genes),
        copy=False,
    )


def _facts(raw: "ray.data.Dataset", spec: DatasetSpec, conditions: Conditions) -> matrix.MatrixFacts:
    columns = ["row", "total", "minimum", "maximum", "whole", "bad_gene", "digest"]
    table = raw.select_columns(columns).to_pandas().sort_values("row")
    facts = matrix.RowFacts(**{name: table[name].to_numpy() for name in columns[1:-1]})
    digests = table["digest"].dropna().tolist()
    return matrix.gather([facts], digests, spec=spec, cell_names=conditions.cell_names, genes=conditions.genes)


def _in_order(references: tuple[ray.ObjectRef, ...]) -> tuple[ray.ObjectRef, ...]:
    first = ray.get([_first_row.remote(reference) for reference in references])
    return tuple(reference for _, reference in sorted(zip(first, references, strict=True), key=lambda pair: pair[0]))


@ray.remote(num_cpus=0)
def _first_row(table: pa.Table) -> int:
    return table["row"][0].as_py()
