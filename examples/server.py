"""A server of pictures: `python examples/server.py FOLDER`, then GET /a red apple for a PNG.

One compiled FLUX transformer, a pipeline for each request, as schedulers hold state, and a session
around its call, which keeps its generation apart from the others.
"""

import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote

import torch
from diffusers import FluxPipeline

import specdiff


def server(folder: str, port: int = 8000, size: int = 1024, steps: int = 28, **options: object):
    """An HTTP server on this machine; `options` are those of the backend."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    shared = FluxPipeline.from_pretrained(folder, torch_dtype=dtype).to(device)
    shared.transformer.compile(backend="specdiff", options=options)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            scheduler = type(shared.scheduler).from_config(shared.scheduler.config)
            pipe = FluxPipeline(**{**shared.components, "scheduler": scheduler})
            with specdiff.session(pipe.transformer):
                prompt = unquote(self.path[1:])
                image = pipe(prompt, height=size, width=size, num_inference_steps=steps).images[0]
            self.send_response(200)
            self.send_header("Content-Type", "image/png")
            self.end_headers()
            image.save(self.wfile, "png")

    return ThreadingHTTPServer(("localhost", port), Handler)


if __name__ == "__main__":
    server(sys.argv[1]).serve_forever()
