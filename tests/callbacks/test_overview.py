"""What TensorBoard shows of a run: asked over its own HTTP interface, and looked at in a browser where there is one."""

import json
import os
import shutil
import time
import urllib.request

import pytest
from lightning.pytorch import Callback
from PIL import Image
from tensorboard import program

from ditlit.callbacks import TrainingMonitor
from ditlit.callbacks.curves import RunLogger

BROWSERS = (os.environ.get("DITLIT_BROWSER"), "chromium", "chromium-browser", "google-chrome", "chrome-headless-shell")
BROWSER = next((path for path in map(shutil.which, filter(None, BROWSERS)) if path), None)


class Judge(Callback):
    """Stands for a callback that judges samples."""

    result_tags = ("eval/FID",)

    def on_train_end(self, trainer, pl_module):
        trainer.logger.log_metrics({"eval/FID": 7.0}, trainer.global_step)


@pytest.fixture
def board(make_module, make_trainer, datamodule, tmp_path):
    """The address of a TensorBoard on a run of eight steps."""
    logger = RunLogger(tmp_path / "runs" / "tiny", name="", version="")
    trainer = make_trainer(logger=logger, max_steps=8, val_check_interval=2, log_every_n_steps=2,
                           callbacks=[TrainingMonitor(), Judge()])  # fmt: skip
    trainer.fit(make_module(), datamodule)
    server = program.TensorBoard()
    server.configure(argv=[None, "--logdir", str(tmp_path / "runs"), "--port", "0", "--load_fast", "false"])
    return server.launch()


def ask(url, body=None):
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=20) as answer:
        return json.load(answer)


def when(question, answered):
    """TensorBoard reads event files in the background: ask until it has."""
    for _ in range(100):
        answer = question()
        if answered(answer):
            return answer
        time.sleep(0.1)
    raise AssertionError(f"TensorBoard never knew: {answer}")


def test_tensorboard_opens_ready_to_read(board):
    tags = when(lambda: ask(board + "data/plugin/scalars/tags"), lambda runs: "eval/FID" in runs.get("tiny", {}))[
        "tiny"
    ]
    layout = ask(board + "data/plugin/custom_scalars/layout")
    sections = {category["title"]: category["chart"] for category in layout["category"]}
    assert list(sections) == ["loss", "health", "throughput", "metrics of samples"]
    shown = {tag for charts in sections.values() for chart in charts for tag in chart["multiline"]["tag"]}
    assert {"train/loss", "val/loss", "train/grad_norm", "throughput/images_per_second"} <= shown & set(tags)

    texts = ask(board + "data/plugin/text/tags")["tiny"]
    assert {"model/text_summary", "store/text_summary"} <= set(texts)
    model = ask(board + "data/plugin/text/text?run=tiny&tag=model/text_summary")[0]["text"]
    assert "multiply-adds" in model and "<table>" in model
    assert "DiT-XL/2" not in model and "depth 2, hidden_size 16, num_heads 2, patch_size 4" in model

    experiment = ask(board + "data/plugin/hparams/experiment", {"experimentName": ""})
    names = {info["name"] for info in experiment["hparamInfos"]}
    assert {"denoiser.patch_size", "optimizer.lr", "global_batch_size", "ema.decay"} <= names
    groups = ask(board + "data/plugin/hparams/session_groups", {
        "experimentName": "", "allowedStatuses": ["STATUS_UNKNOWN", "STATUS_RUNNING", "STATUS_SUCCESS"],
        "colParams": [{"metric": {"tag": "eval/FID", "group": ""}}], "startIndex": 0, "sliceSize": 10,
    })["sessionGroups"]  # fmt: skip
    assert groups[0]["hparams"]["optimizer.lr"] == 0.01
    assert {m["name"]["tag"]: m["value"] for m in groups[0]["metricValues"]}["eval/FID"] == 7.0


@pytest.mark.skipif(BROWSER is None, reason="needs Chromium: install it, or name one in DITLIT_BROWSER")
def test_the_layout_is_what_a_browser_shows(board, tmp_path):
    """A picture of the custom scalars has curves in it: lines in TensorBoard's colours on white."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="needs playwright: pip install playwright")
    picture = tmp_path / "board.png"
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=BROWSER, args=["--single-process", "--no-zygote"])
        page = browser.new_page(viewport={"width": 1500, "height": 1000})
        page.goto(board + "?darkMode=false#custom_scalars")
        page.get_by_text("by timestep").first.wait_for()
        page.wait_for_timeout(3000)  # until the lines are drawn
        page.screenshot(path=picture)
        browser.close()
    pixels = Image.open(picture).convert("RGB")
    assert pixels.size == (1500, 1000)
    colours = {colour: n for n, colour in pixels.getcolors(1 << 24)}
    orange = [(r, g, b) for r, g, b in colours if r > 220 and 60 < g < 150 and b < 90]
    assert sum(colours[c] for c in orange) > 1000 and max(colours) == (255, 255, 255)
    if keep := os.environ.get("DITLIT_PICTURES"):
        shutil.copy(picture, keep)
