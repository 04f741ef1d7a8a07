"""Compare parameter-efficient fine-tuning techniques on one GPU, with a report you can defend."""

__version__ = "0.1.0"
