"""The paper's cells and curves, our runs of them, and the tables and figures that compare both.

A ``Source`` is a number that runs can give: experiment, metric, K. A ``Cell`` or ``Curve`` is where the paper prints
one. The ``Evidence`` of a source is the runs that give it. A ``Comparison`` is a cell with its evidence. A ``Need`` is
a cell, curve or panel with the source of its number.
"""
