"""The server as a Ray Serve deployment: replicas on many GPUs or machines that come and go with the load.

    pip install 'diffusion-gemma-asr[server]' 'ray[serve]'
    DIFFUSION_GEMMA_ASR_MODEL=mini serve run deploy.ray_serve:deployment

A replica is a whole server with its own scheduler, which batches better than `serve.batch` could. It takes
DIFFUSION_GEMMA_ASR_GPUS of a cluster's GPUs, 1 if nothing is said; 0 is for a cluster without.
"""

from __future__ import annotations

import asyncio
import os

from ray import serve

from diffusion_gemma_asr.server.app import create_app
from diffusion_gemma_asr.server.settings import ServerSettings

SETTINGS = ServerSettings(
    models=tuple(os.environ.get("DIFFUSION_GEMMA_ASR_MODEL", "mini").split(",")),
    api_key=os.environ.get("DIFFUSION_GEMMA_ASR_API_KEY") or None,
)
GPUS = float(os.environ.get("DIFFUSION_GEMMA_ASR_GPUS", "1"))


@serve.deployment(
    max_ongoing_requests=64,
    autoscaling_config={"min_replicas": 1, "max_replicas": 8, "target_ongoing_requests": 16, "downscale_delay_s": 600},
    ray_actor_options={"num_gpus": GPUS},
    graceful_shutdown_timeout_s=600,
)
@serve.ingress(lambda: create_app(SETTINGS))  # built in the replica: an app cannot be sent there
class Transcriber:
    """One replica."""

    async def check_health(self) -> None:
        """Asked by Serve, for the first time before it sends requests: they wait elsewhere until the model is loaded."""
        models = self.app.state.models
        while models.loading and not models.was_loaded:
            await asyncio.sleep(0.2)
        if not models.was_loaded:
            raise RuntimeError(f"the model {models.names[0]} cannot be loaded; the log of the replica says why")


deployment = Transcriber.bind()
