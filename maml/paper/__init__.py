"""The paper's cells and curves, what has been run of them, and the tables and figures made of both."""
