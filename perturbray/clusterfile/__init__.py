"""Cluster files of Ray's launcher: what is wrong with one, found before `ray up` starts anything that costs money."""
