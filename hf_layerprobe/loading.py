"""Loads models and tokenizers by folder or Hub id, in the class that the checkpoint names."""

from __future__ import annotations

from pathlib import Path

import transformers
from huggingface_hub.utils import HFValidationError, validate_repo_id
from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.quantizers import AutoHfQuantizer

from .errors import LayerProbeError
from .hub import check_token


def load_model(name_or_path: str | Path, *, token: str | bool | None = None) -> PreTrainedModel:
    """The model with its head: the class under `architectures` in its config, in the dtype it was saved in.

    Args:
        name_or_path: A local folder, or a Hub id (the only case that may use the network).
        token: The token for the Hub, where the one of `hf auth login` or `HF_TOKEN` is not meant.

    Raises:
        LayerProbeError: There is no config that Transformers can read, or it names no class, or one that Transformers does
            not have; or the model is quantised in a way that does not run here; or the token cannot be sent.
        OSError: No such folder or Hub id.
    """
    config, model_class = load_class(name_or_path, token=token)
    check_runs(config)
    return model_class.from_pretrained(name_or_path, dtype="auto", token=token)


def load_class(
    name_or_path: str | Path, *, token: str | bool | None = None
) -> tuple[PreTrainedConfig, type[PreTrainedModel]]:
    """The config of a checkpoint and the model class it names; raises as [`load_model`]."""
    folder = Path(name_or_path)
    if (folder / "adapter_config.json").is_file() and not (folder / "config.json").exists():
        raise LayerProbeError(
            f"{str(name_or_path)!r} holds a PEFT adapter without its base model. Load both with "
            "`AutoPeftModelForCausalLM.from_pretrained` or the like, and pass the model."
        )
    if not folder.is_dir():
        try:
            validate_repo_id(str(name_or_path))
        except HFValidationError as error:
            raise LayerProbeError(
                f"There is no folder {str(name_or_path)!r}, and it is no Hub id. Name a folder that `save_pretrained` wrote, or an "
                "id such as 'organisation/model'."
            ) from error
        check_token(token)
    try:
        # Never asks, never runs its code.
        config = AutoConfig.from_pretrained(name_or_path, token=token, trust_remote_code=False)
    except ValueError as error:
        raise LayerProbeError(
            f"Cannot open the checkpoint {str(name_or_path)!r}. Expected a folder that `save_pretrained` wrote, or the Hub id of a "
            f"model in Transformers. Transformers says: {error}"
        ) from error
    name = (config.architectures or [""])[0]
    model_class = getattr(transformers, name, None) if name else _class_by_task(str(name_or_path), config, token)
    if model_class is None:
        raise LayerProbeError(
            f"The config of {str(name_or_path)!r} names {name or 'no class'!r} under architectures, which Transformers does "
            "not have. Load the model with its own class and pass the model."
        )
    return config, model_class


def check_runs(config: PreTrainedConfig) -> None:
    """Refuses a quantised model that cannot be loaded here, before anything is fetched or written.

    Raises:
        LayerProbeError: Its method is unknown, or the package for it is not installed or does not run on this machine.
    """
    settings = getattr(config, "quantization_config", None)
    if settings is None:
        return
    try:
        # Left alone, an unknown method is passed over, and codes are loaded as if they were weights.
        AutoHfQuantizer.from_config(settings, pre_quantized=True).validate_environment(device_map=None)
    except Exception as error:  # also a NameError, where optimum misses the package for GPTQ
        method = settings.get("quant_method") if isinstance(settings, dict) else settings.quant_method
        raise LayerProbeError(
            f"The model is quantised with {str(method)!r} and cannot be run here: {str(error).rstrip('.')}. Install the package that "
            "Transformers names for this method, or use the unquantised model."
        ) from error


def _class_by_task(name: str, config: PreTrainedConfig, token: str | bool | None) -> type[PreTrainedModel] | None:
    """The class for the task that the Hub knows of a model whose config names none."""
    from optimum.exporters.tasks import TasksManager

    try:
        task = TasksManager.infer_task_from_model(name, token=token)
        return TasksManager.get_model_class_for_task(task, model_type=config.model_type)._model_mapping[type(config)]
    except (RuntimeError, KeyError, ValueError):  # a folder, offline, or nothing is known of it
        return None


def load_tokenizer(name_or_path: str | Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(name_or_path)


def opened(
    model: PreTrainedModel | str | Path | None, tokenizer: PreTrainedTokenizerBase | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A model, loaded if it is named by a folder or Hub id, and its tokenizer.

    Raises:
        LayerProbeError: No model, a model itself without its tokenizer, or as [`load_model`].
    """
    if isinstance(model, (str, Path)):
        return load_model(model), tokenizer or load_tokenizer(model)
    if model is None or tokenizer is None:
        raise LayerProbeError("Pass model= as a folder or Hub id, or a model itself with tokenizer=.")
    return model, tokenizer
