"""What all layers agree on: a request and its answer in OpenAI's chat form, SSE, JSON text, the errors clients see."""
