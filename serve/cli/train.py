"""``florence2 train``: trains the demo checkpoint from nothing on drawn scenes."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Annotated

import typer


def register(app: typer.Typer) -> None:
    app.command("train")(train)


def train(
    folder: Annotated[Path, typer.Argument(help="Where state, log and checkpoint are kept.")],
    steps: Annotated[int, typer.Option(help="The step to train to.")] = 8000,
    images: Annotated[int, typer.Option(help="Images per step.")] = 16,
    prompts: Annotated[int, typer.Option(help="Prompts per image.")] = 5,
    device: Annotated[str, typer.Option(help="cpu, or cuda where there is one.")] = "cpu",
    seed: Annotated[int, typer.Option(help="Seed of the initial weights.")] = 0,
) -> None:
    """Train the demo checkpoint from nothing on drawn scenes. The same folder resumes."""
    from florence2_demo.training import TrainingPlan, train

    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    plan = TrainingPlan(
        steps=steps,
        images_per_batch=images,
        prompts_per_image=prompts,
        device=device,
        seed=seed,
    )
    train(folder, plan)
