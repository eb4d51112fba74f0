"""Which models there are, as clients ask: OpenAI's list, and Anthropic's for those who say so."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from dialects.messages import ALIASES, model_entry, model_list
from router import Router
from routing.catalog import Model
from wire.chat import MODELS_PREFIX, VIRTUAL_MODELS, ModelKind, Need, parse_model
from wire.errors import ModelNotFound
from wire.jsontext import dump

JSON_TYPE = "application/json"


class Listing:
    """GET /v1/models and /v1/models/{id}. `created` is what is told of every model, whose release nobody here knows."""

    def __init__(self, router: Router, created: int) -> None:
        self._router = router
        self._created = created

    def routes(self) -> list[Route]:
        return [Route("/v1/models", self.all), Route("/v1/models/{id:path}", self.one)]

    async def all(self, request: Request) -> Response:
        models = [model for model in self._router.catalog.models if model.enabled]
        if for_anthropic(request):
            chat = dict.fromkeys(model.model_id for model in models if model.kind is ModelKind.CHAT)
            entries = [self._entry(id) for id in (*ALIASES, *VIRTUAL_MODELS, *chat)]
            return Response(model_list(entries), media_type=JSON_TYPE)
        ids = dict.fromkeys((*VIRTUAL_MODELS, *(model.model_id for model in models)))
        return Response(dump({"object": "list", "data": [self._described(id) for id in ids]}), media_type=JSON_TYPE)

    async def one(self, request: Request) -> Response:
        name = request.path_params["id"].removeprefix(MODELS_PREFIX).replace("auto:", "auto-")
        describe = self._entry if for_anthropic(request) else self._described
        try:
            return Response(dump(describe(name)), media_type=JSON_TYPE)
        except ModelNotFound as error:
            raise ModelNotFound(error.message, status=404) from None

    def _described(self, name: str) -> dict[str, Any]:
        """A model as OpenAI lists it, with the context window that agents look for. Raises ModelNotFound."""
        models = self._named(name, None)
        virtual = models is self._router.catalog.auto_chain
        entry: dict[str, Any] = {"id": name, "object": "model", "created": self._created}
        entry["owned_by"] = "freeway" if virtual else models[0].platform.id
        entry["kind"] = ModelKind.CHAT if virtual else models[0].kind
        if models:
            entry["context_window"] = entry["context_length"] = max(m.context_window for m in self._servable(models))
        if entry["kind"] is ModelKind.EMBEDDING:
            entry |= {"family": models[0].family, "dimensions": models[0].dimensions}
        return entry

    def _entry(self, name: str) -> dict[str, Any]:
        """A model as Anthropic lists it. Raises ModelNotFound."""
        models = self._named(name, ModelKind.CHAT)
        own = name in ALIASES or name in VIRTUAL_MODELS
        shown = "Freeway " + name.removeprefix("claude-freeway").strip("-") if own else models[0].name
        servable = self._servable(models)
        lengths = [model.max_output for model in servable if model.max_output is not None]
        window = max((model.context_window for model in servable), default=None)
        return model_entry(name, shown.strip(), window, max(lengths, default=None))

    def _servable(self, models: Sequence[Model]) -> Sequence[Model]:
        """Those that have a usable key: agents fill the window that they are promised. Where none has, all of them:
        what there would be with a key."""
        return [model for model in models if self._router.has_key(model)] or models

    def _named(self, name: str, kind: ModelKind | None) -> list[Model]:
        """The models that a client may be served by under this name. Raises ModelNotFound."""
        catalog = self._router.catalog
        if name in ALIASES and kind is ModelKind.CHAT:
            return catalog.auto_chain
        mode, pinned = parse_model(name)
        need = catalog.meant(Need(mode, pinned, tokens=0))
        return catalog.auto_chain if need.pinned is None else catalog.resolve(need.pinned, kind)


def for_anthropic(request: Request) -> bool:
    return "anthropic-version" in request.headers
