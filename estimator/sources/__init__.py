"""Where a model's config comes from: the catalogue, a config.json, the Hub. May do I/O; imports no framework."""
