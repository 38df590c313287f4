"""The quickstart's verdict: can a machine read the digits that were drawn?"""

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from ditlit.callbacks.pictures import draw_images
from ditlit.data.digits import DigitJudge
from ditlit.images.vae import load_decoder
from ditlit.resilience.run_folder import run_folder


class DigitsReport(Callback):
    """When training ends: draws digits with the averaged weights, has a support vector machine trained on the real ones
    read them, and prints the share that is read as its label.

    Args:
        num_samples: digits to draw, every class in turn.
        seed: of their noise.
        batch_size: samples drawn at once on each device.
    """

    result_tags = ("digits/accuracy",)

    def __init__(self, num_samples: int = 500, seed: int = 1, batch_size: int = 500):
        self.num_samples = num_samples
        self.seed = seed
        self.batch_size = batch_size

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        labels = torch.arange(self.num_samples) % 10
        decode = load_decoder(None, None, pl_module.device)
        images = draw_images(trainer, pl_module, labels, decode, self.seed, self.batch_size)
        folder = run_folder(trainer)
        if not trainer.is_global_zero:
            return
        judge = DigitJudge()
        accuracy = judge.accuracy(images.float() / 127.5 - 1, labels)
        for logger in trainer.loggers:
            logger.log_metrics({"digits/accuracy": accuracy}, step=trainer.global_step)
        print(
            f"\n{accuracy:.1%} of {self.num_samples} drawn digits are read as their label by an SVM trained on real "
            f"digits\n(real digits it has not seen: {judge.real_accuracy:.1%})."
        )
        pictures = sorted((folder / "samples").glob("step-*.png"))
        if pictures:
            print(f"Look at them: {pictures[-1]}")
