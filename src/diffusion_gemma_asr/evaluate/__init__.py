"""Evaluation: text normalisation, error rates, resumable runs over data sets, reports and comparisons."""

INSTALL = "pip install 'diffusion-gemma-asr[evaluation]', or [train] to train"  # not needed to transcribe
