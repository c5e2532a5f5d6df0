"""Counterfactuals: what fitted models say of conditions that nobody measured, as cells in a file or as a ranked table.

Predictions start from control cells of a file of the user's.
"""
