"""`python -m diffusion_gemma_asr` is the command `diffusion-gemma-asr`."""

from diffusion_gemma_asr.cli import main

if __name__ == "__main__":
    main()
