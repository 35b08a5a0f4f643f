"""A page on this machine to ask questions on:

    python -m rag.serve --run runs/notes [serve.port=8000]

Then open http://127.0.0.1:8000 in a browser. The page loads nothing from elsewhere and runs no script. Programs post
`{"question": "..."}` to /api/answer. Only this machine is listened to unless serve.host says otherwise: whoever reaches
the page can read the documents.
"""

# The config is read before PyTorch is imported, so that a typo is reported in a blink.
from common.config import Options, load
from rag.config import Config

if __name__ == "__main__":
    CONFIG, OPTIONS = load(Config, "rag", "serve")

import socket
import threading
from pathlib import Path
from typing import Any

import jinja2
import uvicorn
from fastapi import FastAPI, HTTPException, Request
from fastapi.responses import HTMLResponse, JSONResponse
from pydantic import BaseModel
from starlette.middleware.trustedhost import TrustedHostMiddleware

from common.errors import ProjectError, exits_cleanly
from common.run import Run
from rag.config import ServeConfig
from rag.reader.pipeline import Pipeline, Reply, marked, open_pipeline

LOOPBACK = ("127.0.0.1", "localhost", "::1")
HEADERS = {  # nothing from elsewhere, no script, in nobody's frame
    "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; form-action 'self'; base-uri 'none'; "
    "frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}


class Asked(BaseModel):
    """What a program posts."""

    question: str


@exits_cleanly
def main(config: Config, options: Options) -> None:
    """Open a run and serve it until Ctrl-C."""
    refuse_taken(config.serve)
    with Run(config, options) as run:
        pipeline = open_pipeline(config, options, run)
        if config.serve.host not in LOOPBACK:
            run.display.say(f"note: serve.host={config.serve.host} lets other machines read these documents")
        run.display.say(f"http://{config.serve.host}:{config.serve.port}  (Ctrl-C ends)")
        app = build_app(pipeline, config.serve, run.folder.name)
        uvicorn.run(app, host=config.serve.host, port=config.serve.port, log_level="warning", access_log=False)


def refuse_taken(config: ServeConfig) -> None:
    """`ProjectError` where the address is in use or not this machine's, before anything slow has started."""
    family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
    try:
        with socket.socket(family) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((config.host, config.port))
    except OSError as error:
        raise ProjectError(
            f"cannot listen on {config.host} port {config.port}: {error.strerror or error}; set serve.port=..."
        ) from None


def build_app(pipeline: Pipeline, config: ServeConfig, title: str) -> FastAPI:
    """The web application: a page at /, and /api/answer for programs."""
    app = FastAPI(title=title, docs_url=None, redoc_url=None, openapi_url=None)
    if config.host in LOOPBACK:  # a page elsewhere that a browser has open could give its own name this address
        app.add_middleware(TrustedHostMiddleware, allowed_hosts=[*LOOPBACK, "[::1]"])
    templates = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
    )
    page = templates.get_template("page.html.j2")
    one_at_a_time = threading.Lock()  # a model answers one question after another

    def answer(question: str) -> Reply:
        if len(question) > config.longest_question:
            raise ProjectError(f"a question has at most {config.longest_question} characters")
        with one_at_a_time:
            return pipeline.ask(question)

    @app.middleware("http")
    async def add_headers(request: Request, call_next: Any) -> Any:
        response = await call_next(request)
        response.headers.update(HEADERS)
        return response

    @app.get("/")
    def show(q: str = "") -> HTMLResponse:
        about: dict[str, Any] = {"title": title, "reader": pipeline.name, "question": q, "reply": None, "error": ""}
        status = 200
        if q.strip():
            try:
                about |= described(answer(q))
            except ProjectError as error:
                about["error"] = str(error)
                status = 400
        return HTMLResponse(page.render(about), status)

    @app.post("/api/answer")
    def post(asked: Asked) -> JSONResponse:
        try:
            return JSONResponse(answer(asked.question).as_json())
        except ProjectError as error:
            raise HTTPException(400, str(error)) from None

    return app


def described(reply: Reply) -> dict[str, Any]:
    """What the page shows of a reply: sources in pieces, those with the answer's words to be marked."""
    plain = reply.as_json()
    for source in plain["sources"]:
        source["pieces"] = marked(source["text"], plain["answer"]) if source["cited"] else [(source["text"], False)]
    return {"reply": plain, "guess": reply.answer.text}


if __name__ == "__main__":
    main(CONFIG, OPTIONS)
