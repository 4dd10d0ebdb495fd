"""What is done with models and caches: a stage is run_x(config, ...) -> result."""
