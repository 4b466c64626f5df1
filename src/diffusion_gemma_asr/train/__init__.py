"""Training: one loop, and the three stages that make a model (acoustic encoder, backbone, adapter)."""
