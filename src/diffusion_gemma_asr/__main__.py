"""`python -m diffusion_gemma_asr` is the command `diffusion-gemma-asr`."""

from .app.cli import main

if __name__ == "__main__":
    main()
