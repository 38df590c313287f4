"""Pictures and texts for every logger that can take them; the others are passed over."""

from collections.abc import Iterable
from typing import Any

from lightning.pytorch.loggers import CometLogger, Logger, MLFlowLogger
from torch import Tensor
from torchvision.transforms.functional import to_pil_image


def log_picture(loggers: Iterable[Logger], name: str, picture: Tensor, step: int) -> None:
    """Show bytes (3, H, W) under a name, as a picture of this optimizer step."""
    for logger in loggers:
        if takes(logger, "log_image"):  # of WandbLogger
            logger.log_image(name, [to_pil_image(picture)], step=step)
        elif takes(getattr(logger, "experiment", None), "add_image"):  # of TensorBoard's SummaryWriter
            logger.experiment.add_image(name, picture, step)
        elif isinstance(logger, MLFlowLogger):
            place = f"{name}/step-{step:08d}.png"
            logger.experiment.log_image(logger.run_id, to_pil_image(picture), artifact_file=place)
        elif isinstance(logger, CometLogger):
            logger.experiment.log_image(to_pil_image(picture), name=name, step=step)


def log_text(loggers: Iterable[Logger], name: str, text: str) -> None:
    """Show Markdown under a name."""
    for logger in loggers:
        if takes(logger, "log_text"):
            logger.log_text(name, columns=[name], data=[[text]])  # a table
        elif takes(getattr(logger, "experiment", None), "add_text"):
            logger.experiment.add_text(name, text)
        elif isinstance(logger, MLFlowLogger):
            logger.experiment.log_text(logger.run_id, text, artifact_file=f"{name}.md")
        elif isinstance(logger, CometLogger):
            logger.experiment.log_text(text, metadata={"name": name})


def takes(target: Any, method: str) -> bool:
    return callable(getattr(target, method, None))
