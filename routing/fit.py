"""Which models a request fits, and what its client is told when it fits none (SPEC 3.7, 21.3, 21.4)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from routing.catalog import Catalog, Model
from routing.clients import is_among
from wire.chat import Need
from wire.errors import GatewayError, InvalidRequest, NoProviders, PromptTooLong


def fitting(need: Need, models: Iterable[Model]) -> list[Model]:
    """The models that hold this request, can do what it asks for and may, whatever their rank."""
    models = permitted(need, models)
    return [m for m in models if m.holds(need.tokens) and (m.vision or not need.vision) and (m.tools or not need.tools)]


def permitted(need: Need, models: Iterable[Model]) -> Iterable[Model]:
    """The models that the client's key allows."""
    return models if need.allowed is None else [m for m in models if is_among(need.allowed, m)]


def reaches_floor(need: Need, model: Model, catalog: Catalog) -> bool:
    """Whether the model is ranked as well as the client asks for."""
    return need.min_rank is None or catalog.intelligence(model) <= need.min_rank


def unfit(need: Need, models: Sequence[Model]) -> GatewayError:
    """What is missing when this request fits none of the models."""
    if not models:
        return NoProviders()
    if need.vision and not (models := [m for m in models if m.vision]):
        return InvalidRequest("No enabled model with a key can see images.", status=422, code="no_vision_model")
    if need.tools and not (models := [m for m in models if m.tools]):
        return InvalidRequest("No enabled model with a key can call tools.", status=422, code="no_tool_model")
    return PromptTooLong(need.tokens, max(m.tokens_max for m in models))


def below_floor(need: Need, **details: Any) -> GatewayError:
    """Only models below the client's floor could serve this now. `details` are GatewayError's."""
    message = f"No model of intelligence rank {need.min_rank} or better can answer now. Wait, or raise X-Min-Rank."
    return GatewayError(message, status=503, type="routing_error", code="below_floor", **details)


def no_private_route() -> GatewayError:
    message = (
        "No provider that could serve this is known not to train on prompts. Add a key of one that is, "
        "or mark a paid key with trains_on_prompts: false."
    )
    return GatewayError(message, status=403, type="routing_error", code="no_private_route")
