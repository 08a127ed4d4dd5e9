"""Text out of a model: filters, sampling, generate."""
