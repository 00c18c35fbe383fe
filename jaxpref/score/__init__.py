"""Scores of the images of a data set, from which experts are chosen."""
