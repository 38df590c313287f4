"""Pictures and texts reach every logger that can take them, and runs with others go on without."""

from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch.loggers import CometLogger, CSVLogger, Logger, MLFlowLogger

from ditlit.callbacks import SampleGrid, TrainingMonitor
from ditlit.callbacks.loggers import log_picture, log_text
from ditlit.data import LatentDataModule, write_store


class Plain(Logger):
    """What Lightning asks of a logger, and no more."""

    name, version = "fake", 0

    def __init__(self):
        self.metrics, self.settings, self.shown = [], {}, []

    def log_metrics(self, metrics, step=None):
        self.metrics.append((step, metrics))

    def log_hyperparams(self, params, *args, **kwargs):
        self.settings |= params


class LikeWandb(Plain):
    """With the methods of WandbLogger for pictures and texts."""

    def log_image(self, key, images, step=None, **kwargs):
        self.shown.append((key, step, images[0].size))

    def log_text(self, key, columns=None, data=None, dataframe=None, step=None):
        self.shown.append((key, step, data[0][0]))


class LikeTensorBoard(Plain):
    """With a writer that has the methods of SummaryWriter."""

    @property
    def experiment(self):
        return SimpleNamespace(
            add_image=lambda tag, picture, step: self.shown.append((tag, step, tuple(picture.shape[:0:-1]))),
            add_text=lambda tag, text: self.shown.append((tag, None, text)),
        )


@pytest.mark.parametrize("kind", [LikeWandb, LikeTensorBoard])
def test_pictures_and_texts_of_a_run_reach_loggers_that_take_them(make_module, make_trainer, tmp_path, kind):
    write_store(tmp_path / "s", torch.rand(40, 3, 8, 8), torch.arange(40) % 5, 5)
    data = LatentDataModule(str(tmp_path / "s"), val_size=8, global_batch_size=8)
    able, plain = kind(), Plain()
    callbacks = [TrainingMonitor(), SampleGrid(every_n_steps=2, per_class=2, classes=[1])]
    make_trainer(callbacks=callbacks, logger=[plain, able], log_every_n_steps=2).fit(make_module(), data)
    assert [(key, step) for key, step, _ in able.shown] == [
        ("model", None), ("store", None), ("samples", 2), ("real", 2), ("samples", 4),
    ]  # fmt: skip
    assert "multiply-adds" in able.shown[0][2] and "3 x 8 x 8" in able.shown[1][2]
    width, height = able.shown[2][2]
    assert height == 64 + 4 and width > 2 * 66 + 2
    for logger in (able, plain):
        assert [step for step, metrics in logger.metrics if "train/loss" in metrics] == [2, 4]
        assert logger.settings["optimizer.lr"] == 0.01 and logger.settings["denoiser.patch_size"] == 4


@pytest.mark.parametrize("kind", [MLFlowLogger, CometLogger])
def test_other_services_get_them_in_their_own_words(kind):
    calls = []
    experiment = SimpleNamespace(
        log_image=lambda *args, **kwargs: calls.append((args[-1].size, kwargs)),
        log_text=lambda *args, **kwargs: calls.append((args[-1], kwargs)),
    )

    class Offline(kind):
        run_id = "run"

        def __init__(self):
            """Connects to nothing."""

        @property
        def experiment(self):
            return experiment

    picture = torch.zeros(3, 4, 6, dtype=torch.uint8)
    log_picture([Offline()], "samples", picture, 7)
    log_text([Offline()], "model", "text")
    expected = {
        MLFlowLogger: [{"artifact_file": "samples/step-00000007.png"}, {"artifact_file": "model.md"}],
        CometLogger: [{"name": "samples", "step": 7}, {"metadata": {"name": "model"}}],
    }
    assert [what for what, _ in calls] == [(6, 4), "text"]
    assert [kwargs for _, kwargs in calls] == expected[kind]


def test_a_logger_of_numbers_is_passed_over(tmp_path):
    logger = CSVLogger(tmp_path)
    log_picture([logger], "samples", torch.zeros(3, 4, 6, dtype=torch.uint8), 7)
    log_text([logger], "model", "text")
