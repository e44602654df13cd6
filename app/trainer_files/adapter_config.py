"""An `adapter_config.json` of PEFT: the `peft` of a request, and the model it belongs to."""

from app.trainer_files.translation import Keys
from estimator.errors import RequestError


def translate(keys: Keys) -> None:
    """Put an adapter into the request; its fields are read, sorted and refused as those of a pasted LoraConfig are."""
    model = keys.text("base_model_name_or_path")
    if model is not None and keys.found.value("model") is None:
        keys.put("model", model, "base_model_name_or_path")
    keys.put("revision", keys.text("revision") if model is not None else None, "revision")
    for key in keys.values:
        if "." in key:  # would be read as a place within a field
            raise RequestError(f"{keys.named(key)}: is no field of a LoraConfig", field=keys.named(key))
        if key not in keys.taken:
            keys.put(f"peft.{key}", keys.take(key), key)
