"""Running out of memory: how it is recognised, and how much a device has to give. Trainer and engine ask here."""

from __future__ import annotations

import gc

import torch

_PHRASES = (
    "out of memory",
    "not enough memory",
    "can't allocate memory",
    "_status_alloc_failed",  # cuBLAS, cuDNN, cuSOLVER: their own workspaces
    "cublas_status_not_initialized when calling `cublascreate",  # the same: a handle that got no memory
)


def out_of_memory(error: BaseException) -> bool:
    """Whether `error` says that an allocation failed: on a GPU, by one of its libraries, or on the CPU."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(phrase in str(error).lower() for phrase in _PHRASES)


def free(device: torch.device | None = None) -> None:
    """Give what torch holds without need back to the GPU. Without a `device`, also collect what only cycles keep alive, such as the
    frames of an error that was caught."""
    if device is None:
        gc.collect()
    if torch.cuda.is_available() and (device is None or device.type == "cuda"):
        torch.cuda.empty_cache()


def room(device: torch.device) -> int | None:
    """Bytes that could still be allocated on a GPU; None for other devices, where nothing is known of it."""
    if device.type != "cuda":
        return None
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return int(torch.cuda.mem_get_info(device)[0] + unused)


def device_bytes(device: torch.device) -> int | None:
    """All memory of a GPU in bytes; None for other devices."""
    return int(torch.cuda.get_device_properties(device).total_memory) if device.type == "cuda" else None
