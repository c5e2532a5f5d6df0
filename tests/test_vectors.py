"""Vectors of perturbations are read from every format alike, and a file that holds none says what is wrong with it."""

import os
import pickle

import numpy as np
import pandas as pd
import pytest

from perturbray.data.dataset import DatasetSpec
from perturbray.embeddings.vectors import READERS, Vectors, digest
from perturbray.errors import InputError
from perturbray.models.neighbours import KnnEmbedding
from perturbray.trial import Trial

NAMES = ["TP53", "NA", "007", "drug / 2", "γ"]
VALUES = np.random.default_rng(0).standard_normal((5, 3))


def write(folder, suffix: str, *, names=NAMES, values=VALUES):
    place = folder / f"vectors{suffix}"
    frame = pd.DataFrame(values, index=pd.Index(names, name="name"), columns=[f"v{i}" for i in range(values.shape[1])])
    if suffix == ".npz":
        np.savez(place, label=np.array(names), numbers=values)
    elif suffix == ".parquet":
        frame.to_parquet(place)
    else:
        frame.to_csv(place, sep="\t" if suffix == ".tsv" else ",")
    return place


@pytest.mark.parametrize("suffix", READERS)
def test_every_format_holds_the_same(tmp_path, suffix):
    found = Vectors.read(str(write(tmp_path, suffix)))
    assert found.names == tuple(NAMES)
    np.testing.assert_allclose(found.values, VALUES, rtol=1e-12)


def test_names_kept_as_objects_are_read_and_no_code_is_run(tmp_path):
    np.savez(tmp_path / "objects.npz", label=np.array(NAMES, dtype=object), numbers=VALUES)
    assert Vectors.read(str(tmp_path / "objects.npz")).names == tuple(NAMES)

    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "hacked"),)

    np.savez(tmp_path / "evil.npz", label=np.array([Evil()] * 5, dtype=object), numbers=VALUES)
    with pytest.raises(InputError, match=r"an array holds posix\.mkdir objects; save names as strings"):
        Vectors.read(str(tmp_path / "evil.npz"))
    assert not (tmp_path / "hacked").exists()


def test_pickled_numpy_functions_are_refused_too(tmp_path):
    class Evil:
        def __reduce__(self):
            return np.load, (str(tmp_path / "other.npy"), None, True)

    pickle.dumps(Evil())
    np.savez(tmp_path / "evil.npz", label=np.array([Evil()], dtype=object), numbers=VALUES[:1])
    with pytest.raises(InputError, match=r"an array holds numpy\S+ objects"):
        Vectors.read(str(tmp_path / "evil.npz"))


@pytest.mark.parametrize(
    ("policy", "expected"), [("zero", [0, 0, 0]), ("drop", [0, 0, 0]), ("mean", VALUES[[0, 4]].mean(axis=0))]
)
def test_a_missing_name_has_what_the_policy_says(tmp_path, policy, expected):
    vectors = Vectors.read(str(write(tmp_path, ".csv")))
    values, found = vectors.select(["TP53", "BRCA1", "γ"], missing=policy)
    assert found.tolist() == [True, False, True]
    np.testing.assert_allclose(values[[0, 2]], VALUES[[0, 4]])
    np.testing.assert_allclose(values[1], expected)


def test_a_missing_name_is_an_error_that_names_it(tmp_path):
    vectors = Vectors.read(str(write(tmp_path, ".csv")))
    with pytest.raises(
        InputError, match=r"no vector for 2 perturbation\(s\): TP54, X \(of 'TP54': did you mean 'TP53'"
    ):
        vectors.select(["TP53", "TP54", "X"], missing="error")
    with pytest.raises(InputError, match="did you mean 'zero'"):
        vectors.select(["TP53"], missing="zeros")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("v.csv", "name,a\nTP53,1\nTP53,2\n", "'TP53' has two vectors"),
        ("v.csv", "name,a\nTP53,high\n", "column 'a' holds 'high'; after the first column, of names, all are numbers"),
        ("v.csv", "name,a\nTP53,\n", "the vector of 'TP53' is not finite"),
        ("v.csv", "name,a\n,1\n", "row 1 has no name"),
        ("v.csv", "name\nTP53\n", "it holds no vectors"),
        ("v.csv", "name,a\n", "it holds no vectors"),
        ("v.npz", "not a zip", "cannot be read as npz"),
        ("v.parquet", "not parquet", "cannot be read as parquet"),
        ("v.txt", "x", r"vectors are read from \.npz, \.csv, \.tsv, \.parquet, not from '\.txt'"),
    ],
)
def test_a_file_without_vectors_says_what_is_wrong(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(InputError, match=message):
        Vectors.read(str(tmp_path / name))


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"a": VALUES, "b": VALUES}, "one array of names and one matrix of numbers; it has a float64"),
        ({"a": np.array(NAMES[:4]), "b": VALUES}, "a has 4 names, but b has 5 rows"),
    ],
)
def test_an_npz_needs_names_and_a_matrix(tmp_path, arrays, message):
    np.savez(tmp_path / "v.npz", **arrays)
    with pytest.raises(InputError, match=message):
        Vectors.read(str(tmp_path / "v.npz"))


def test_a_file_that_is_not_there_names_those_that_are(tmp_path):
    write(tmp_path, ".csv")
    with pytest.raises(InputError, match=r"there is no such file; did you mean 'vectors\.csv'"):
        Vectors.read(str(tmp_path / "vector.csv"))


def test_the_key_of_a_trial_holds_the_vectors_and_not_where_they_are(tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    first.mkdir()
    second.mkdir()
    paths = [write(first, ".csv"), write(second, ".csv"), write(second, ".tsv", values=VALUES + 1)]
    assert digest(str(paths[0])) == digest(str(paths[1])) != digest(str(paths[2]))
    trials = [Trial(dataset=DatasetSpec(path="x.h5ad"), model=KnnEmbedding(vectors=str(path))) for path in paths]
    keys = [trial.key("content") for trial in trials]
    assert keys[0] == keys[1] != keys[2]


def test_the_fingerprints_of_sciplex3_are_read(shared_data):
    vectors = Vectors.read(str(shared_data / "sciplex3" / "morgan_fingerprints.npz"))
    assert vectors.values.shape == (188, 1024)
    assert set(np.unique(vectors.values)) == {0, 1}
    drugs = pd.read_csv(shared_data / "sciplex3" / "drug_smiles.csv")
    names = drugs.iloc[:, 0].tolist()  # short names, of which the fingerprints have the long form for about half
    with pytest.raises(InputError, match=r"no vector for 108 perturbation.*AC480, AG-490"):
        vectors.select(names, missing="error")
    values, found = vectors.select(names, missing="drop")
    assert 0.4 < found.mean() < 0.5
    assert (values[found].sum(axis=1) > 5).all()
