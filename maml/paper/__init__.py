"""The paper's cells and curves, our runs of them, and the tables and figures that compare both."""
