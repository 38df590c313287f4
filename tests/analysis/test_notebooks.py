"""The notebooks: all run on a digits checkpoint, are kept with their outputs, and can be read by others."""

import json
import re
from pathlib import Path

import nbformat
import pytest
import yaml
from nbclient import NotebookClient

from ditlit.settings.configs import find_config

NAMES = ("quickstart", "checkpoint_analysis", "guidance_and_steps", "latent_space")
FOLDER = Path(__file__).parents[2] / "notebooks"
MOST_BYTES = 700_000
# What a first cell is given here instead: little of everything.
SMALL = {
    "quickstart": dict(SAMPLES=20),
    "checkpoint_analysis": dict(SAMPLES=8, LOSS_SAMPLES=40),
    "guidance_and_steps": dict(SAMPLES=12, SCALES=[1, 2], STEPS=[2, 12], SAMPLERS=["ddim", "dpm++"]),
    "latent_space": dict(SAMPLES=40),
}


def notebook(name):
    return nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)


def code(book):
    return [cell for cell in book.cells if cell.cell_type == "code"]


def with_settings(book, settings):
    """The notebook with other values in its first cell."""
    cell = code(book)[0]
    for name, value in settings.items():
        cell.source, count = re.subn(
            rf"^{name} = .*$", lambda _, n=name, v=value: f"{n} = {v!r}", cell.source, flags=re.M
        )
        assert count == 1, f"the first cell sets no {name}"
    return book


def execute(name, folder, **settings):
    book = with_settings(notebook(name), SMALL[name] | settings)
    NotebookClient(book, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(folder)}}).execute()
    return book


def text_of(book):
    outputs = [output for cell in code(book) for output in cell.outputs]
    return "".join(output.get("text", "") for output in outputs)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where the quickstart has run: a small digits model, trained for a few steps."""
    root = tmp_path_factory.mktemp("root")
    config = yaml.safe_load(Path(find_config("digits.yaml")).read_text())
    config["model"]["denoiser"]["init_args"] |= dict(hidden_size=32, depth=2, num_heads=2)
    config["model"]["sampling"]["num_steps"] = 5
    config["trainer"] |= dict(max_steps=60, val_check_interval=30, log_every_n_steps=10)
    config["save_every"] = 30
    (root / "small.yaml").write_text(yaml.safe_dump(config))
    (root / "notebooks").mkdir()
    book = execute("quickstart", root / "notebooks", CONFIG=str(root / "small.yaml"))
    assert "of 20 drawn digits are read as their label" in text_of(book)
    assert (root / "runs" / "digits" / "checkpoints" / "last.ckpt").is_file()
    return root / "notebooks"


@pytest.mark.parametrize("name", NAMES[1:])
def test_a_notebook_runs_on_what_the_quickstart_makes(folder, name):
    """With the paths that it has by default: the run beside its folder, and the store that the run names."""
    assert len(text_of(execute(name, folder))) > 200


def test_a_checkpoint_with_one_set_of_weights_is_analysed_too(folder):
    from ditlit import checkpoints
    from ditlit.checkpoints.safetensors_files import write_safetensors

    root = folder.parent
    write_safetensors(checkpoints.read(root / "runs/digits/checkpoints/last.ckpt"), root / "released.safetensors")
    store = str(root / "data" / "digits" / "val")
    book = execute("checkpoint_analysis", folder, CHECKPOINT="../released.safetensors", STORE=store)
    assert "nothing to compare" in text_of(book)


@pytest.mark.parametrize("name", NAMES)
def test_it_is_kept_with_its_outputs_as_one_run_from_top_to_bottom_left_them(name):
    cells = code(notebook(name))
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell.outputs]
    assert all(output.output_type != "error" and output.get("name") != "stderr" for output in outputs)
    pictures = [output for output in outputs if "image/png" in output.get("data", {})]
    assert len(pictures) >= 6 and text_of(notebook(name))


@pytest.mark.parametrize("name", NAMES)
def test_it_is_small_and_names_nothing_of_the_machine_it_ran_on(name):
    path = FOLDER / f"{name}.ipynb"
    assert path.stat().st_size < MOST_BYTES
    book = json.loads(path.read_text())
    for cell in book["cells"]:
        for output in cell.get("outputs", ()):
            for data in output.get("data", {}), {"text": output.get("text", "")}:
                shown = "".join("".join(value) for kind, value in data.items() if kind != "image/png")
                assert not re.search(r"(?<![\w.])/(home|root|tmp|work|usr|opt|mnt|Users|var)\b", shown), shown
    assert set(book["metadata"]) == {"kernelspec", "language_info"}


@pytest.mark.parametrize("name", NAMES)
def test_it_defines_no_models_and_says_what_to_see_after_its_figures(name):
    book = notebook(name)
    source = "\n".join(cell.source for cell in code(book))
    assert not re.search(r"^\s*class |nn\.Module|nn\.Linear", source, flags=re.M)
    kinds = [cell.cell_type for cell in book.cells]
    for i, cell in enumerate(book.cells):
        if any("image/png" in output.get("data", {}) for output in cell.get("outputs", ())):
            assert "markdown" in kinds[i + 1 : i + 3], "a figure without words"
