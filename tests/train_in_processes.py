"""A short training in several processes, for tests: `torchrun … train_in_processes.py ddp|fsdp2 FOLDER`."""

import json
import sys
from pathlib import Path

import torch
from tiny import tiny_model
from training import rows
from transformers import Trainer, TrainingArguments

from hf_layerprobe import LayerProbeCallback

FSDP2 = {"fsdp": True, "fsdp_config": {"version": 2, "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]}}


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
        **(FSDP2 if kind == "fsdp2" else {}),
    )
    # Five rows for two processes: accelerate repeats some, which must not count.
    callback = LayerProbeCallback(("avss", "influence", "docs", "drift"), max_seconds=60)
    trainer = Trainer(
        tiny_model("llama"), args, train_dataset=rows(8, 1), eval_dataset=rows(5, 2, padding=2), callbacks=[callback]
    )
    trainer.train()
    state = trainer.accelerator.get_state_dict(trainer.model_wrapped)
    if trainer.is_world_process_zero():
        torch.save(state, Path(folder, "state.pt"))
    Path(folder, f"log-{args.process_index}.json").write_text(json.dumps(trainer.state.log_history))


if __name__ == "__main__":
    main(*sys.argv[1:])
