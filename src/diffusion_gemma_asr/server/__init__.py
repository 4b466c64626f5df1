"""The HTTP server: OpenAI's routes for speech, one scheduler for each loaded model. Needs the extra [server]."""
