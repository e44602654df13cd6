"""The machine and the libraries a case ran with."""

import torch

from calibration.record import Environment, environment_here


def environment(device: torch.device) -> Environment:
    """Facts of this process; the parent adds the driver."""
    if device.type != "cuda":
        return environment_here()
    card = torch.cuda.get_device_properties(device)
    return environment_here(
        gpu=card.name,
        compute_capability=f"{card.major}.{card.minor}",
        num_multiprocessors=card.multi_processor_count,
        total_bytes=card.total_memory,
        cuda=torch.version.cuda,
    )


def missing_cuda() -> str | None:
    """What keeps CUDA from being used here, None if nothing does."""
    if torch.cuda.is_available():
        return None
    if torch.version.cuda is None:
        return f"measuring needs a CUDA build of torch; torch {torch.__version__} is built without CUDA"
    if torch.cuda.device_count() == 0:
        return "measuring needs an NVIDIA GPU and its driver; torch finds no CUDA device (does nvidia-smi run, and list the card?)"
    return "measuring needs an NVIDIA GPU; CUDA cannot be initialised on this machine (is the driver too old for this torch?)"
