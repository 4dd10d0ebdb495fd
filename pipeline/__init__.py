"""How a person drives Permafrost: command line, recipes, plan, runner, report."""

__version__ = "0.1.0"
