"""A short training in several processes, for tests: `torchrun … train_in_processes.py ddp|fsdp2|fsdp2-lora FOLDER`."""

import json
import sys
from pathlib import Path

import torch
from accelerate.utils import DistributedType
from peft import LoraConfig, get_peft_model
from tiny import tiny_model
from training import rows
from transformers import Trainer, TrainingArguments

from hf_layerprobe import LayerProbeCallback

FSDP2 = {"fsdp": True, "fsdp_config": {"version": 2, "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]}}


def built(kind: str) -> torch.nn.Module:
    """The model at the start; the same in all processes."""
    model = tiny_model("llama")
    if not kind.endswith("lora"):
        return model
    torch.manual_seed(0)
    return get_peft_model(model, LoraConfig(target_modules=["q_proj", "up_proj"], init_lora_weights=False))


def main(kind: str, folder: str) -> None:
    args = TrainingArguments(
        folder,
        max_steps=2,
        eval_strategy="steps",
        eval_steps=2,
        learning_rate=0.05,
        per_device_train_batch_size=2,
        per_device_eval_batch_size=2,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        **({} if kind == "ddp" else FSDP2),
    )
    if kind != "ddp":
        # accelerate knows FSDP on GPUs and the like only; on a CPU it would train by DDP without a word.
        args.distributed_state._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    # Five rows for two processes: accelerate repeats some, which must not count.
    callback = LayerProbeCallback(("avss", "influence", "docs", "drift"), max_seconds=60)
    data = dict(train_dataset=rows(8, 1), eval_dataset=rows(5, 2, padding=2))
    Path(folder, "file").touch()  # where no start of drift can be kept, no process must wait for what the others gather
    nowhere = LayerProbeCallback("drift", every=1, output_dir=Path(folder, "file"))
    trainer = Trainer(built(kind), args, **data, callbacks=[callback, nowhere])
    trainer.train()
    assert (trainer.accelerator.distributed_type == DistributedType.FSDP) == (kind != "ddp")
    state = trainer.accelerator.get_state_dict(trainer.model_wrapped)
    if trainer.is_world_process_zero():
        torch.save(state, Path(folder, "state.pt"))
    Path(folder, f"log-{args.process_index}.json").write_text(json.dumps(trainer.state.log_history))


if __name__ == "__main__":
    main(*sys.argv[1:])
