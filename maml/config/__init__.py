"""From yaml to checked settings: schema, identity of a run, composition, hints."""
