"""measure.report: files that cannot be written are known before the work, and are whole or absent after it."""

import os
import shutil
from argparse import Namespace
from pathlib import Path

import fake_matplotlib
import pytest

from measure.report import check_matplotlib, check_output_file, check_report_files, write_file
from system.errors import InputError


def assert_refused(match: str, function, *args) -> None:
    with pytest.raises(InputError, match=match):
        function(*args)


def test_what_can_be_written_is_checked_and_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for path in (Path("new"), tmp_path / "old", Path("link"), Path("link to a new one")):
        if path.name == "old":
            path.write_text("a longer text")
        if "link" in path.name:
            path.symlink_to(f"target of {path.name}")
        check_output_file("--json", path)
        write_file("--json", path, b"data")
        assert path.read_bytes() == b"data"
    assert Path("link").is_symlink()
    assert not list(tmp_path.glob("*.part"))


def test_a_folder_that_is_not_ours_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda folder, mode: Path(folder) != tmp_path.resolve())
    assert_refused("^--json .*x: its folder cannot be written to$", check_output_file, "--json", tmp_path / "x")
    (tmp_path / "inner").mkdir()
    check_output_file("--json", tmp_path / "inner" / "x")


def test_a_link_to_nowhere_is_refused(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "no folder" / "x")
    assert_refused("--json .*link: its folder cannot", check_output_file, "--json", tmp_path / "link")


def test_a_failed_write_names_the_flag_and_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "x"
    path.write_text("old")
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: Namespace(free=1))
    assert_refused("^--plot .*x: .* GB needed", write_file, "--plot", path, b"data")
    assert [file.name for file in tmp_path.iterdir()] == ["x"]
    assert path.read_text() == "old"


def test_two_reports_in_one_file_are_refused(tmp_path, monkeypatch):
    fake_matplotlib.install(monkeypatch)
    monkeypatch.chdir(tmp_path)
    args = Namespace(json=Path("x"), plot=tmp_path / "x")
    assert_refused("^--plot .*x: is --json's file$", check_report_files, args)
    for json, plot in ((Path("x"), Path("y")), (Path("x"), None), (None, Path("x")), (None, None)):
        check_report_files(Namespace(json=json, plot=plot))


def test_a_report_never_replaces_an_input(tmp_path):
    model = tmp_path / "config.json"
    model.write_text("{}")
    (tmp_path / "link").symlink_to(model)
    for name in ("config.json", "link"):
        match = f"^--json .*config.json: is the same file as {model}, an input$"
        assert_refused(match, check_output_file, "--json", tmp_path / name, [model])
        assert_refused(match, write_file, "--json", tmp_path / name, b"data", [model])
    assert model.read_text() == "{}"


def test_matplotlib_that_cannot_draw_is_known_at_once(tmp_path, monkeypatch):
    fake_matplotlib.install(monkeypatch)
    check_matplotlib(tmp_path / "x.png")
    monkeypatch.setattr("measure.report.png", lambda figure: 1 / 0)
    assert_refused("^--plot .*x.png: matplotlib fails .division by zero", check_matplotlib, tmp_path / "x.png")
