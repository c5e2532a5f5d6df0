"""Wilcoxon tables by pdex, in its own environment."""

import anndata
from pdex import pdex
from serve import serve


def tables(path, warm):
    def run(file):
        found = pdex(anndata.read_h5ad(file), groupby="condition", reference="control", threads=1, is_log1p=True)
        return found.height

    run(warm)  # compiles
    return lambda: run(path)


if __name__ == "__main__":
    serve({"de": tables})
