"""Where a model is put and in which precision its weights are kept."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from holdfast.errors import ModelError, pip_install

if TYPE_CHECKING:
    import torch

FOUR_BITS = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}


def may_load_in_4bit(device: str | torch.device = "auto") -> None:
    """Raise ModelError unless this machine can hold and tune 4-bit weights."""
    place = device_for(device)
    if place.type != "cuda":
        what = f"load_in_4bit needs a CUDA device, but the model would be on {place.type}."
        raise ModelError(what, "Use an NVIDIA GPU, or remove load_in_4bit.")
    from transformers.utils.import_utils import BITSANDBYTES_MIN_VERSION, is_bitsandbytes_available

    if not is_bitsandbytes_available():
        what = f"load_in_4bit needs bitsandbytes {BITSANDBYTES_MIN_VERSION} or newer, which is not installed."
        raise ModelError(what, f"Run: {pip_install('bnb')}, or remove load_in_4bit.")


def four_bits(dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    """What from_pretrained wants for QLoRA's weights: NF4, its scales quantised too, products in `dtype`."""
    from transformers import BitsAndBytesConfig

    config = BitsAndBytesConfig(**FOUR_BITS, bnb_4bit_compute_dtype=dtype)
    return {"quantization_config": config, "device_map": {"": device}}


def precision(model: Any) -> str:
    """In what the weights are kept, for reports: 'bfloat16', 'nf4, bfloat16' or 'gptq, float16'."""
    name = str(model.dtype).removeprefix("torch.")
    if getattr(model, "is_loaded_in_4bit", False):
        return f"nf4, {name}"
    packed = getattr(model.config, "quantization_config", None) if is_packed(model) else None
    method = getattr(packed, "quant_method", None)
    return f"{getattr(method, 'value', method)}, {name}" if method else name


def is_packed(model: Any) -> bool:
    """Whether weights are kept in a few bits, so that they can be neither trained nor merged into."""
    return bool(getattr(model, "is_quantized", False) or getattr(model, "is_loaded_in_4bit", False))


def auto_place() -> tuple[torch.device, torch.dtype]:
    """Where and in which precision `load` puts a model by default."""
    place = device_for("auto")
    return place, dtype_for("auto", place)


def device_for(device: str | torch.device) -> torch.device:
    import torch

    if device != "auto":
        return torch.device(device)
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def dtype_for(dtype: str | torch.dtype, device: torch.device) -> torch.dtype:
    import torch

    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype != "auto":
        found: Any = getattr(torch, dtype, None)
        if not isinstance(found, torch.dtype) or not found.is_floating_point:
            raise ModelError(f"dtype {dtype!r} is not one of torch.", "Use auto, float32, bfloat16 or float16.")
        return found
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    fast = device.type == "cpu" and _cpu_computes_bf16()
    return torch.bfloat16 if fast else torch.float32


def _cpu_computes_bf16() -> bool:
    """Whether the CPU has bfloat16 instructions: mkldnn says yes on any AVX-512, but only emulates."""
    import platform

    import torch

    if platform.machine().lower() in ("x86_64", "amd64"):
        probes = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
        return any(getattr(torch.cpu, probe, bool)() for probe in probes)
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
