"""The config: composition of yaml files, schema, identity of a run, and hints for wrong keys."""
