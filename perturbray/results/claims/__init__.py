"""Claims of the literature as tests of a sweep's table: `claim` is the abstraction, `published` holds the sixteen."""
