"""How precisely a device can compute."""

import torch


def widest(device: torch.device) -> torch.dtype:
    """float64, or float32 on the one backend (MPS) that has nothing wider."""
    return torch.float32 if device.type == "mps" else torch.float64
