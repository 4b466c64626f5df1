"""Measuring: text normalisation, error rates, resumable runs over data sets, reports and comparisons."""
