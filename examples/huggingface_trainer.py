"""make run-example EXAMPLE=huggingface_trainer

Hugging Face's Trainer: one line between making it and `train`.
"""

from pathlib import Path
from tempfile import gettempdir

from texts import Windows
from tiny_gpt2 import tiny_gpt2
from torch.utils.data import Subset
from transformers import Trainer, TrainingArguments

from hetero_async.integrations.huggingface import attach


def main(output_dir: str = str(Path(gettempdir()) / "hetero_async-huggingface")) -> Trainer:
    arguments = TrainingArguments(
        output_dir=output_dir,
        per_device_train_batch_size=8,
        gradient_accumulation_steps=2,
        learning_rate=1e-2,
        lr_scheduler_type="cosine",  # over the run's progress
        warmup_steps=0.05,  # a share of the run
        eval_strategy="steps",
        eval_steps=20,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
    )
    trainer = Trainer(
        model=tiny_gpt2(),
        args=arguments,
        train_dataset=Windows(),
        eval_dataset=Subset(Windows(), range(0, 500, 10)),
    )
    attach(trainer)
    trainer.train()
    return trainer


if __name__ == "__main__":
    main()
