"""Training data: manifests, synthetic speech, cached features, batches."""
