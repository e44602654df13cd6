"""The config of a request's model."""

from calibration.case import JsonObject
from estimator.errors import RequestError


def config_of(request: JsonObject) -> JsonObject:
    """Content of the config.json of `request["model"]`, within the bounds that every config is held to.

    Raises:
        VramplanError: if the model is not given or not known, or its config out of bounds.
    """
    from estimator.sources import bounds, catalogue, hub

    model = request.get("model")
    revision = request.get("revision")
    if isinstance(model, dict) and isinstance(config := model.get("config"), dict):
        return bounds.check(config)
    if not isinstance(model, str) or not model:
        raise RequestError("model: required: an id, or {'config': {…}}", field="model")
    if revision in (None, "main") and (entry := catalogue.find(model)) is not None:
        return dict(catalogue.load(entry.file).config)
    return hub.fetch(model, str(revision) if revision is not None else None).config
