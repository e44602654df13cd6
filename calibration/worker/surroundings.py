"""The machine and the libraries a case ran with."""

import platform

import torch
import transformers

from calibration.record import Environment, allocator_config, package_version


def environment(device: torch.device) -> Environment:
    """Facts of this process; the parent adds the driver."""
    on_card = device.type == "cuda"
    card = torch.cuda.get_device_properties(device) if on_card else None
    return Environment(
        gpu=card.name if card else None,
        compute_capability=f"{card.major}.{card.minor}" if card else None,
        num_multiprocessors=card.multi_processor_count if card else None,
        total_bytes=card.total_memory if card else None,
        cuda=torch.version.cuda,
        torch=torch.__version__,
        transformers=transformers.__version__,
        peft=package_version("peft"),
        bitsandbytes=package_version("bitsandbytes"),
        accelerate=package_version("accelerate"),
        trl=package_version("trl"),
        python=platform.python_version(),
        system=platform.platform(),
        allocator_config=allocator_config(),
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
