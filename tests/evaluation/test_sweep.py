"""Sweeps: every combination once, resumable point by point, with tables and plots of what was measured."""

import csv
import errno
import json
import os
import sys
from pathlib import Path

import pytest
from calls import evaluate_sweep
from PIL import Image

from ditlit.commands import evaluate_sweep as sweep
from ditlit.errors import InputError
from ditlit.settings.flags import flat

SETTINGS = dict(ckpt="c.ckpt", reference="r.npz", guidance_scale="1,1.5", num_steps="25, 50", sampler="ddim")


@pytest.fixture
def commands(monkeypatch):
    """Stands in for the two commands of a point; fails at the one whose number is in ``fail``."""
    calls, fail = [], set()

    def run(command, settings):
        settings = flat(settings)
        calls.append((command, settings))
        if len(calls) in fail:
            raise InputError(f"ditlit {command} failed")
        if command == "sample":
            Path(settings["out"], "images").mkdir(parents=True)
        else:
            job = calls[-2][1]
            metrics = {"FID": 100 / job["num_steps"] + job["guidance_scale"], "IS": 10 * job["guidance_scale"]}
            Path(settings["out"]).write_text(json.dumps({"metrics": metrics}))

    monkeypatch.setattr(sweep, "run", run)
    monkeypatch.setattr(sweep, "read_report", lambda path: json.loads(path.read_text()))
    return calls, fail


def test_every_combination_is_sampled_and_evaluated_once(commands, tmp_path):
    calls, _ = commands
    evaluate_sweep(**SETTINGS, interval="all,100-800", out=str(tmp_path))
    drawn = [settings for command, settings in calls if command == "sample"]
    found = {(s["num_steps"], s["guidance_scale"], s["guidance_interval"]) for s in drawn}
    assert found == {(n, g, i) for n in (25, 50) for g in (1.0, 1.5) for i in (None, (100, 800))} and len(drawn) == 8
    judged = [settings for command, settings in calls if command == "evaluate"]
    assert [s["generated"] for s in judged] == [s["out"] for s in drawn]
    with open(tmp_path / "table.csv") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 8 and rows[0]["FID"] == "5.0" and rows[-1]["guidance_interval"] == "[100,800]"
    assert (tmp_path / "table.md").read_text().count("\n") == 10
    for name in ("guidance.png", "steps.png"):
        assert Image.open(tmp_path / name).width > 500
    assert not list(tmp_path.glob("points/*/samples"))  # the images have served


def test_a_sweep_that_fails_goes_on_where_it_was(commands, tmp_path):
    calls, fail = commands
    fail.add(5)  # while the third point is sampled
    with pytest.raises(InputError, match="ditlit sample failed"):
        evaluate_sweep(**SETTINGS, out=str(tmp_path))
    assert len(list(tmp_path.glob("points/*/point.json"))) == 2
    fail.clear()
    evaluate_sweep(**SETTINGS, out=str(tmp_path))
    assert len(calls) == 5 + 4
    with pytest.raises(InputError, match="begun with other seed: choose another --out"):
        evaluate_sweep(**SETTINGS, out=str(tmp_path), seed=1)


def test_mistakes(tmp_path):
    with pytest.raises(InputError, match="--num_steps takes values separated by commas, got '25,x'"):
        evaluate_sweep(**SETTINGS | {"num_steps": "25,x"}, out=str(tmp_path))
    with pytest.raises(InputError, match="--interval takes values"):
        evaluate_sweep(**SETTINGS, interval="100", out=str(tmp_path))
    assert not any(tmp_path.iterdir())


def test_what_would_fail_at_the_end_is_found_before_the_first_point(commands, tmp_path, monkeypatch):
    calls, _ = commands
    (tmp_path / "a" / "guidance.png").mkdir(parents=True)
    with pytest.raises(InputError, match=r"guidance.png is a folder; give a file with --out"):
        evaluate_sweep(**SETTINGS, out=str(tmp_path / "a"))
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "sweep.json").write_text("{")
    with pytest.raises(InputError, match=r"sweep.json cannot be read \(.*choose another --out"):
        evaluate_sweep(**SETTINGS, out=str(tmp_path / "b"))
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(InputError, match="plots need matplotlib"):
        evaluate_sweep(**SETTINGS, out=str(tmp_path / "c"))
    assert not calls and not (tmp_path / "c").exists()


@pytest.mark.parametrize("what", ["write_atomically", "plot_steps"])
def test_numbers_are_shown_where_tables_or_plots_cannot_be_written(commands, tmp_path, monkeypatch, capsys, what):
    write = sweep.write_atomically

    def fails(path, data):
        if what == "write_atomically" and path.name != "table.md":
            return write(path, data)
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(sweep, what, fails)
    with pytest.raises(InputError, match=r"cannot write .*: Read-only file system. The numbers are those shown above"):
        evaluate_sweep(**SETTINGS, out=str(tmp_path))
    assert (tmp_path / "points").exists()
    if what == "plot_steps":
        assert "| ddim | 50 | 1.5 |" in capsys.readouterr().out
