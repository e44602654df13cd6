"""The config of a request's model."""

from calibration.case import JsonObject
from estimator.errors import RequestError


def config_of(request: JsonObject) -> JsonObject:
    """Content of the config.json of `request["model"]`.

    Raises:
        VramplanError: if the model is not given or not known.
    """
    model = request.get("model")
    if isinstance(model, dict) and isinstance(config := model.get("config"), dict):
        return config
    if isinstance(model, str) and model:
        raise RequestError(f"model: {model!r}: give its config as {{'config': {{…}}}}; measuring by id is not there yet", field="model")
    raise RequestError("model: required: an id, or {'config': {…}}", field="model")
