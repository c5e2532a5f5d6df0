"""From the files of finished trials to a table, a summary, a figure and a page. Imports neither torch nor Ray."""
