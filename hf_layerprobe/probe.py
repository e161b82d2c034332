"""`LayerProbe`: the library's functions as methods of a model, by mixin or attached to one that exists."""

from __future__ import annotations

from functools import cache, wraps
from typing import Any

import transformers
from transformers import PreTrainedModel

from . import plan as planning
from . import prune as pruning
from . import scores
from .plan import PruningPlan
from .scores import LayerScores, SimilarityMatrix
from .stacks import LayerStack, find_stacks


class LayerProbe:
    """Mixin that adds layer scores and pruning to any `PreTrainedModel`; every method forwards to a function.

    As a mixin, `class MyModel(LayerProbe, LlamaForCausalLM)`, or on a model that exists, `LayerProbe.attach(model)`.
    """

    def find_stacks(self) -> list[LayerStack]:
        """See [`hf_layerprobe.find_stacks`]."""
        return find_stacks(self)

    def docs(self, **options: Any) -> SimilarityMatrix:
        """See [`hf_layerprobe.docs`]."""
        return scores.docs(self, **options)

    def avss(self, data: Any, **options: Any) -> LayerScores:
        """See [`hf_layerprobe.avss`]."""
        return scores.avss(self, data, **options)

    def eavss(self, pairs: Any, tokenizer: Any, **options: Any) -> LayerScores:
        """See [`hf_layerprobe.eavss`]."""
        return scores.eavss(self, pairs, tokenizer, **options)

    def score_layers(self, data: Any = None, **options: Any) -> LayerScores | dict[str, LayerScores]:
        """See [`hf_layerprobe.score_layers`]."""
        return scores.score_layers(self, data, **options)

    def plan_pruning(self, data: Any = None, **options: Any) -> PruningPlan:
        """See [`hf_layerprobe.plan_pruning`]."""
        return planning.plan_pruning(self, data, **options)

    def prune_layers(self, plan: PruningPlan | None = None, **options: Any) -> PreTrainedModel:
        """See [`hf_layerprobe.prune_layers`]; the new model has these methods too."""
        return pruning.prune_layers(self, plan, **options)

    @wraps(PreTrainedModel.save_pretrained)
    def save_pretrained(self, *args: Any, **options: Any) -> None:
        # Transformers writes the name of the model's class into the config, and whoever loads the folder has not this one.
        own = type(self)
        self.__class__ = _saved_class(own)
        try:
            super().save_pretrained(*args, **options)
        finally:
            self.__class__ = own

    @staticmethod
    def attach(model: PreTrainedModel) -> PreTrainedModel:
        """Adds the methods to a model in place and returns it.

        The model's class becomes a subclass of the one it had, with the same name and module, so that saved configs,
        `isinstance`, copying and pickling work as before.

        Raises:
            TypeError: Not a `PreTrainedModel`.
        """
        if not isinstance(model, PreTrainedModel):
            raise TypeError(
                f"LayerProbe attaches to a transformers PreTrainedModel, got {type(model).__name__}. Of a wrapper (PEFT, "
                "torch.compile, DDP), attach to the model inside."
            )
        if not isinstance(model, LayerProbe):
            model.__class__ = _attached_class(type(model))
        return model

    @staticmethod
    def detach(model: PreTrainedModel) -> PreTrainedModel:
        """Gives an attached model back the exact class it had; any other model is returned as it is.

        Raises:
            TypeError: Something has made a class of its own from the attached one since, as FSDP2 does.
        """
        if isinstance(model, _Attached):
            if _Attached not in type(model).__bases__:
                raise TypeError(
                    f"{type(model).__name__} was made from the class with LayerProbe attached, as by FSDP2: detach before."
                )
            model.__class__ = type(model).__bases__[1]
        return model


@cache
def _saved_class(model_class: type[PreTrainedModel]) -> type[PreTrainedModel]:
    """The class under the name of the first one below it that Transformers has, if that is one to load.

    One that was attached to has its name already, and one that is saved with its code is loaded by its own.
    """
    if issubclass(model_class, _Attached) or model_class._auto_class is not None:
        return model_class
    for base in model_class.__mro__:
        is_model = issubclass(base, PreTrainedModel) and not base.__name__.endswith("PreTrainedModel")
        if is_model and getattr(transformers, base.__name__, None) is base:
            return type(base.__name__, (model_class,), {})
    return model_class


class _Attached(LayerProbe):
    """Marks the classes made by `attach`, which pickle as their original class plus the act of attaching."""

    def __reduce_ex__(self, protocol):
        _, (_, *rest), *state = super().__reduce_ex__(max(int(protocol), 2))
        return _new_attached, (type(self).__bases__[1], *rest), *state


@cache
def _attached_class(model_class: type[PreTrainedModel]) -> type[PreTrainedModel]:
    names = {name: getattr(model_class, name) for name in ("__module__", "__qualname__", "__doc__")}
    return type(model_class.__name__, (_Attached, model_class), names)


def _new_attached(model_class: type[PreTrainedModel], *rest: Any) -> PreTrainedModel:
    attached = _attached_class(model_class)
    return attached.__new__(attached, *rest)
