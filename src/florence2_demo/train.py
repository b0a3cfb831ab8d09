"""``python -m florence2_demo.train FOLDER``: the demo checkpoint from nothing; resumes."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from florence2.errors import FlorenceError
from florence2_demo.training import TrainingPlan, train


def main(arguments: Sequence[str] | None = None) -> None:
    """Trains the demo checkpoint on drawn scenes; the same folder goes on where it stopped."""
    plan = TrainingPlan()
    parser = argparse.ArgumentParser(prog="python -m florence2_demo.train", description=__doc__)
    parser.add_argument("folder", type=Path, help="where state, log and checkpoint are kept")
    parser.add_argument("--steps", type=int, default=plan.steps, help="the step to train to")
    parser.add_argument(
        "--images", type=int, default=plan.images_per_batch, help="images of each step"
    )
    parser.add_argument(
        "--prompts", type=int, default=plan.prompts_per_image, help="prompts about each image"
    )
    parser.add_argument("--device", default=plan.device, help="cpu, or cuda where there is one")
    parser.add_argument("--seed", type=int, default=plan.seed, help="seed of the first weights")
    given = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    wanted = TrainingPlan(
        steps=given.steps,
        images_per_batch=given.images,
        prompts_per_image=given.prompts,
        device=given.device,
        seed=given.seed,
    )
    try:
        train(given.folder, wanted)
    except FlorenceError as error:
        parser.exit(2, f"{error}\n")


if __name__ == "__main__":
    main(sys.argv[1:])
