"""Loggers: services that show a run's metrics and reports, in addition to the files in its run folder."""
