"""How precisely a device can compute."""

import torch


def widest(device: torch.device) -> torch.dtype:
    """float64, or float32 on the one backend (MPS) that has nothing wider."""
    return torch.float32 if device.type == "mps" else torch.float64


def gains_from_bfloat16(device: torch.device) -> bool:
    """Whether products of bfloat16 are much faster than those of float32: on GPUs that have them, and on CPUs with AMX."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type == "cpu" and bool(torch.cpu.get_capabilities().get("amx_bf16"))
