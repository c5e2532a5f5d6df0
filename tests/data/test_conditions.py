"""Laws of Conditions: what a file means does not depend on how it is stored, and bad files are refused by name."""

from dataclasses import replace
from itertools import product
from pathlib import Path

import anndata as ad
import h5py
import numpy as np
import pandas as pd
import pytest
import screens
from scipy import sparse

from perturbray.data.dataset import DatasetSpec, fingerprint, split_label
from perturbray.errors import InputError

LABELS = ["control", "b", "a", "a+b", "b+a", "control", "control+a", "a"]
LINES = ["y", "y", "y", "y", "x", "x", "x", "x"]


def spec_of(path, **fields) -> DatasetSpec:
    return DatasetSpec(path=str(path), **{"covariates": ("line",), **fields})


@pytest.fixture
def obs() -> pd.DataFrame:
    return pd.DataFrame({"condition": LABELS, "line": LINES})


@pytest.fixture
def path(tmp_path, obs):
    return screens.write(tmp_path / "screen.h5ad", obs)


def cells_by_name(conditions) -> dict[str, tuple]:
    """What every cell is, in words."""
    pairs = list(conditions)
    names = conditions.cell_names.tolist()
    return {name: pairs[code] for name, code in zip(names, conditions.cell_condition, strict=True)}


def test_conditions_are_the_distinct_pairs_in_order_of_context_and_label(path):
    conditions = spec_of(path).conditions()
    assert list(conditions) == [
        (("x",), "a"),
        (("x",), "a+b"),
        (("x",), "control"),
        (("y",), "a"),
        (("y",), "a+b"),
        (("y",), "b"),
        (("y",), "control"),
    ]
    assert conditions.singles == (("a",), ("a", "b"), (), ("a",), ("a", "b"), ("b",), ())
    assert conditions.cells.tolist() == [2, 1, 1, 1, 1, 1, 1]
    assert conditions.perturbations == ("a", "a+b", "b")
    assert conditions.is_control.tolist() == [False, False, True, False, False, False, True]
    assert conditions.context_name(1) == "y"
    assert conditions.genes == ("gene_0",)


def test_order_of_the_parts_of_a_combination_does_not_matter(path):
    cells = cells_by_name(spec_of(path).conditions())
    assert cells["cell_00003"][1] == cells["cell_00004"][1] == "a+b"


def test_a_control_token_in_a_combination_is_dropped(path):
    assert cells_by_name(spec_of(path).conditions())["cell_00006"] == (("x",), "a")


@pytest.mark.parametrize(
    ("label", "control", "delimiter", "singles"),
    [
        ("A+B", "control", "+", ("A", "B")),
        ("B + A", "control", "+", ("A", "B")),
        ("A+control", "control", "+", ("A",)),
        ("control+control", "control", "+", ()),
        ("C[S+](C)[O-]", "C[S+](C)[O-]", "+", ()),  # DMSO, the control of OP3
        ("C[S+](C)[O-]", "control", None, ("C[S+](C)[O-]",)),
        ("A+B", "control", None, ("A+B",)),
        ("A_B", "control", "+", ("A_B",)),
        ("A_B", "control", "_", ("A", "B")),
    ],
)
def test_a_label_splits_into_its_singles(label, control, delimiter, singles):
    assert split_label(label, control=control, delimiter=delimiter) == singles


def test_a_control_label_that_holds_the_delimiter_is_the_control(tmp_path):
    dmso = "C[S+](C)[O-]"
    path = screens.write(tmp_path / "op3.h5ad", {"SMILES": [dmso, "CC[N+]C", "CCO"], "line": ["T cells"] * 3})
    conditions = spec_of(path, perturbation="SMILES", control=dmso, delimiter=None).conditions()
    assert dict(zip(conditions.perturbation, conditions.is_control, strict=True)) == {
        dmso: True,
        "CC[N+]C": False,
        "CCO": False,
    }


def test_contexts_are_tuples_so_that_underscores_and_shared_values_do_not_collide():
    pairs = [("a_b", "c"), ("a", "b_c"), ("c", "a_b"), ("b_c", "a")]
    cells = [(context, label) for context, label in product(pairs, ("control", "KO_1_2"))]
    conditions = screens.conditions_of(cells)
    assert set(conditions.contexts) == set(pairs)
    assert set(conditions) == set(cells)
    assert conditions.perturbations == ("KO_1_2",)


def test_number_of_cells_and_their_codes_agree(lab):
    conditions = lab.conditions
    assert conditions.cells.sum() == len(conditions.cell_condition) == len(conditions.cell_names)
    assert conditions.cells.min() > 0
    assert len(conditions) == 3 * 13


STORED = {
    "strings": lambda values: np.array(values, dtype=object),
    "categories": lambda values: pd.Categorical(values),
    "categories in another order, one of them unused": lambda values: pd.Categorical(
        values, ["unused", *sorted(set(values), reverse=True)]
    ),
}


@pytest.mark.parametrize("stored", STORED.values(), ids=STORED)
@pytest.mark.parametrize("seed", [None, 0, 1])
def test_neither_order_of_rows_nor_storage_of_columns_matters(tmp_path, obs, path, stored, seed):
    expected = spec_of(path).conditions()
    order = np.arange(len(obs)) if seed is None else np.random.default_rng(seed).permutation(len(obs))
    names = np.array([f"cell_{i:05d}" for i in order])
    columns = {key: stored(obs[key].iloc[order].tolist()) for key in obs}
    found = spec_of(screens.write(tmp_path / "other.h5ad", columns, names=names)).conditions()
    assert list(found) == list(expected)
    assert found.singles == expected.singles
    assert found.contexts == expected.contexts
    assert cells_by_name(found) == cells_by_name(expected)


@pytest.mark.parametrize(
    ("values", "levels"),
    [
        ([0.5, 10.0, 0.5, 10.0], ("0.5", "10.0")),
        ([1, 10, 1, 10], ("1", "10")),
        ([True, False, True, False], ("False", "True")),
        (pd.array([1, 10, 1, 10], dtype="Int64"), ("1", "10")),
        (pd.Categorical([0.5, 10.0, 0.5, 10.0]), ("0.5", "10.0")),
    ],
    ids=["float", "int", "bool", "nullable", "categorical float"],
)
def test_a_dose_in_numbers_is_a_covariate(tmp_path, values, levels):
    path = screens.write(tmp_path / "dose.h5ad", {"condition": ["control", "control", "a", "a"], "dose": values})
    conditions = spec_of(path, covariates=("dose",)).conditions()
    assert conditions.contexts == tuple((level,) for level in levels)
    assert len(conditions) == 4


MATRICES = {
    "csr": sparse.csr_matrix,
    "csc": sparse.csc_matrix,
    "dense": np.asarray,
    "dense float64": lambda values: np.asarray(values, dtype=np.float64),
    "integers": lambda values: sparse.csr_matrix(values.astype(np.int32)),
}


@pytest.mark.parametrize("store", MATRICES.values(), ids=MATRICES)
def test_conditions_do_not_depend_on_how_the_matrix_is_stored(tmp_path, obs, store):
    values = np.arange(len(obs) * 3, dtype=np.float32).reshape(-1, 3)
    layers = {"counts": store(values)}
    path = screens.write(tmp_path / "stored.h5ad", obs, X=store(values), genes=["u", "v", "w"], layers=layers)
    for layer in (None, "counts"):
        conditions = spec_of(path, layer=layer).conditions()
        assert conditions.genes == ("u", "v", "w")
        assert len(conditions) == 7


@pytest.mark.filterwarnings("ignore::anndata.OldFormatWarning")
def test_a_table_of_the_categories_of_older_files_is_read(tmp_path, path):
    """anndata below 0.8 kept categories beside the columns, in ``__categories``."""
    old = tmp_path / "old.h5ad"
    with h5py.File(old, "w") as file:
        obs = file.create_group("obs")
        obs.attrs.update({"encoding-type": "dataframe", "encoding-version": "0.1.0", "_index": "index"})
        obs.attrs["column-order"] = np.array(["condition", "line"], dtype=object)
        obs["index"] = np.array([f"cell_{i:05d}" for i in range(len(LABELS))], dtype=h5py.string_dtype())
        for key, values in (("condition", LABELS), ("line", LINES)):
            codes, levels = pd.factorize(np.array(values), sort=True)
            obs[key] = codes.astype(np.int8)
            obs[f"__categories/{key}"] = levels.astype(h5py.string_dtype())
            obs[key].attrs["categories"] = obs[f"__categories/{key}"].ref
        with h5py.File(path) as source:
            source.copy("var", file)
            source.copy("X", file)
    expected, found = spec_of(path).conditions(), spec_of(old).conditions()
    assert list(found) == list(expected)
    assert cells_by_name(found) == cells_by_name(expected)


def bytes_read() -> int:
    """By this process so far, from the page cache or not."""
    fields = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(fields["rchar"])


@pytest.mark.skipif(not Path("/proc/self/io").exists(), reason="the kernel counts bytes on Linux alone")
@pytest.mark.parametrize("store", ["dense", "csr"])
def test_conditions_read_obs_and_var_and_never_x(tmp_path, store):
    cells, genes = 500, 10_000
    X = np.random.default_rng(0).random((cells, genes), dtype=np.float32)
    obs = {"condition": ["control", "a"] * (cells // 2), "line": ["x"] * cells}
    path = screens.write(tmp_path / "wide.h5ad", obs, X=X if store == "dense" else sparse.csr_matrix(X))
    spec = spec_of(path)
    spec.conditions()  # whatever is imported at the first use is not counted

    before = bytes_read()
    assert len(spec.conditions().genes) == genes
    asked = bytes_read() - before
    assert path.stat().st_size >= 20e6
    assert asked < path.stat().st_size / 20

    before = bytes_read()
    with h5py.File(path) as file:
        file["X"][:] if store == "dense" else file["X"]["data"][:]
    assert bytes_read() - before >= 20e6, "the instrument sees X where it is read"


# What is wrong, and what the message must say: the file, the thing at fault, and what would be right.


def test_a_missing_file_is_refused_and_its_neighbour_suggested(path):
    with pytest.raises(InputError, match=r"scren\.h5ad: there is no such file; did you mean 'screen\.h5ad'\?"):
        spec_of(path.with_name("scren.h5ad")).conditions()


def test_a_file_in_a_missing_folder_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"nowhere/screen\.h5ad: there is no such file$"):
        spec_of(tmp_path / "nowhere" / "screen.h5ad").conditions()


@pytest.mark.parametrize("content", [b"", b"cell,condition\n1,control\n"], ids=["empty", "csv"])
def test_a_file_of_another_kind_is_refused(tmp_path, content):
    path = tmp_path / "screen.h5ad"
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"screen\.h5ad: this is not an h5ad file .*AnnData\.write_h5ad"):
        spec_of(path).conditions()


def test_a_folder_that_is_no_zarr_store_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"this folder is neither a zarr store nor an h5ad file.*AnnData\.write_zarr"):
        spec_of(tmp_path).conditions()


def test_a_file_that_was_cut_off_is_refused(path):
    path.write_bytes(path.read_bytes()[:3000])
    with pytest.raises(InputError, match=r"screen\.h5ad: .*(cut off|damaged)"):
        spec_of(path).conditions()


def test_an_hdf5_file_without_obs_is_refused_with_what_it_has(tmp_path):
    with h5py.File(tmp_path / "other.h5ad", "w") as file:
        file["matrix"] = np.ones(3)
    with pytest.raises(InputError, match=r"other\.h5ad: .*no obs and var; it has matrix"):
        spec_of(tmp_path / "other.h5ad").conditions()


@pytest.mark.parametrize("fields", [{"perturbation": "conditions"}, {"covariates": ("lines",)}])
def test_a_missing_column_is_refused_with_those_there_are(path, fields):
    with pytest.raises(
        InputError, match=r"screen\.h5ad: obs has no column '\w+s'; it has condition, line; did you mean"
    ):
        spec_of(path, **fields).conditions()


def test_a_control_label_that_does_not_occur_is_refused_with_the_nearest(path):
    with pytest.raises(
        InputError, match=r"screen\.h5ad: no cell has obs\['condition'\] == 'ctrl' .*; did you mean 'control'"
    ):
        spec_of(path, control="ctrl").conditions()


def test_a_context_without_controls_is_refused_by_name(tmp_path, obs):
    obs["line"] = ["y"] * 5 + ["z", "z", "w"]
    path = screens.write(tmp_path / "bare.h5ad", obs)
    with pytest.raises(
        InputError, match=r"bare\.h5ad: line = w has no control cells .*obs\['condition'\] == 'control'"
    ):
        spec_of(path).conditions()


def test_a_screen_of_controls_is_refused(tmp_path):
    path = screens.write(tmp_path / "rest.h5ad", {"condition": ["control"] * 4, "line": ["x"] * 4})
    with pytest.raises(InputError, match=r"rest\.h5ad: every cell .*nothing to predict"):
        spec_of(path).conditions()


@pytest.mark.parametrize("column", ["condition", "line"])
@pytest.mark.parametrize("stored", [STORED["strings"], STORED["categories"]], ids=["strings", "categories"])
def test_missing_labels_are_refused_with_their_number_and_the_first_cell(tmp_path, obs, column, stored):
    values = obs[column].tolist()
    values[2] = values[5] = None
    columns = {**obs, column: stored(values)}
    path = screens.write(tmp_path / "gaps.h5ad", columns)
    with pytest.raises(InputError, match=rf"gaps\.h5ad: obs\['{column}'\] is missing in 2 cells .*cell_00002"):
        spec_of(path).conditions()


@pytest.mark.parametrize("label", ["", " ", "+"])
def test_a_label_that_names_nothing_is_not_taken_as_a_control(tmp_path, obs, label):
    obs.loc[2, "condition"] = label
    path = screens.write(tmp_path / "empty.h5ad", obs)
    with pytest.raises(InputError, match=r"empty\.h5ad: obs\['condition'\] .* cell_00002"):
        spec_of(path).conditions()


def test_a_gene_that_occurs_twice_is_refused_by_name(tmp_path, obs):
    X = np.ones((len(obs), 3), dtype=np.float32)
    path = tmp_path / "twice.h5ad"
    adata = ad.AnnData(X=X, obs=obs.set_index(np.arange(len(obs)).astype(str)))
    adata.var_names = ["MYC", "TP53", "other"]
    adata.write_h5ad(path)
    with h5py.File(path, "r+") as file:
        file["var"][file["var"].attrs["_index"]][1] = "MYC"
    with pytest.raises(InputError, match=r"twice\.h5ad: gene 'MYC' occurs twice .*var_names_make_unique"):
        spec_of(path).conditions()


def test_a_matrix_of_another_shape_than_obs_and_var_is_refused(path):
    with h5py.File(path, "r+") as file:
        del file["X"]
        file["X"] = np.ones((3, 1), dtype=np.float32)
    with pytest.raises(InputError, match=r"screen\.h5ad: the matrix is \(3, 1\), but obs has 8 rows and var 1"):
        spec_of(path).conditions()


def test_a_missing_layer_is_refused_with_those_there_are(tmp_path, obs):
    layers = {"counts": np.ones((len(obs), 1), dtype=np.float32)}
    path = screens.write(tmp_path / "layers.h5ad", obs, layers=layers)
    with pytest.raises(InputError, match=r"layers\.h5ad: no layer 'count': did you mean 'counts'\?"):
        spec_of(path, layer="count").conditions()


def test_a_file_without_x_is_refused_and_its_layers_named(tmp_path, obs):
    path = screens.write(tmp_path / "layers.h5ad", obs, layers={"counts": np.ones((len(obs), 1), dtype=np.float32)})
    with h5py.File(path, "r+") as file:
        del file["X"]
    with pytest.raises(InputError, match=r"layers\.h5ad: there is no X; name a layer with --layer, there are: counts"):
        spec_of(path).conditions()
    assert len(spec_of(path, layer="counts").conditions()) == 7


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"normalize": "log1q"}, "normalize='log1q': did you mean 'log1p'"),
        ({"covariates": ()}, "at least one covariate"),
    ],
)
def test_a_spec_that_cannot_be_is_refused(fields, message):
    with pytest.raises(InputError, match=message):
        DatasetSpec(path="screen.h5ad", **fields)


def test_covariates_are_a_tuple_whatever_they_were_given_as():
    """A list would not hash, and a string would be taken letter by letter."""
    assert DatasetSpec(path="a.h5ad", covariates=["line", "dose"]).covariates == ("line", "dose")
    assert DatasetSpec(path="a.h5ad", covariates="line").covariates == ("line",)


def test_a_dataset_is_named_after_its_file_unless_it_has_a_name():
    assert DatasetSpec(path="folder/norman19.h5ad").name == "norman19"
    assert DatasetSpec(path="folder/norman19.h5ad", name="Norman").name == "Norman"


def test_fingerprint_is_the_content_and_not_the_place(path):
    moved = path.with_name("moved.h5ad")
    moved.write_bytes(path.read_bytes())
    conditions = spec_of(path).conditions()
    same = fingerprint(conditions, "digest")
    assert fingerprint(spec_of(moved, name="other").conditions(), "digest") == same
    changed = [
        fingerprint(conditions, "another digest"),
        fingerprint(replace(conditions, genes=("gene_9",)), "digest"),
        fingerprint(replace(conditions, cell_names=conditions.cell_names[::-1]), "digest"),
        fingerprint(replace(conditions, cell_condition=conditions.cell_condition[::-1].copy()), "digest"),
        fingerprint(replace(conditions, control="other"), "digest"),
    ]
    assert len({same, *changed}) == len(changed) + 1
