"""What all commands share: exit statuses, quiet, tables, and JSON that reaches standard output whole or says why not."""

import subprocess
import sys
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from stepcal.cli.main import app
from stepcal.cli.output import aligned, emit, reports_errors
from stepcal.errors import InputError


def command_that_raises(error: BaseException) -> typer.Typer:
    own = typer.Typer()

    @own.command()
    @reports_errors
    def fail() -> None:
        raise error

    return own


@pytest.mark.parametrize(
    ("error", "status", "said"),
    [
        (InputError("`x` is 3; it must be 2."), 2, "Error: `x` is 3; it must be 2."),
        (InputError("long " * 10_000), 2, "..."),
        (MemoryError("64 GiB"), 2, "Error: not enough memory. 64 GiB."),
        (PermissionError(13, "Permission denied", "/x"), 2, "Error: /x: Permission denied."),
        (KeyboardInterrupt(), 130, "Error: interrupted"),
        (KeyError("surprise"), 70, "Error: this is a bug of stepcal: KeyError in test_output.py"),
        (RecursionError("deep"), 70, "Please report it"),
    ],
)
def test_every_error_has_a_message_and_a_status(error: BaseException, status: int, said: str) -> None:
    done = CliRunner().invoke(command_that_raises(error), [])
    assert done.exit_code == status
    assert said in done.stderr
    assert "Traceback" not in done.stderr
    assert len(done.stderr) < 2_100


def test_the_traceback_of_a_bug_can_be_asked_for(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setenv("STEPCAL_TRACEBACK", "1")
    done = CliRunner().invoke(command_that_raises(ZeroDivisionError("x")), [])
    assert done.exit_code == 70
    assert "Traceback" in done.stderr + capsys.readouterr().err


def test_columns_are_as_wide_as_their_widest_cell() -> None:
    lines = aligned([["ms", "mean", "p99"], ["overall", "123,456,789.00", "1.00"]])
    assert lines == ["ms                 mean   p99", "overall  123,456,789.00  1.00"]


SIMULATE = [
    "simulate", "--architecture", "llama-2-7b", "--kv-blocks", "500", "--coefficients", "ten.json", "--workload", "w.yaml",
]  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    Path("ten.json").write_text('{"variant": "affine", "parameters": [{"name": "constant_us", "value": 1000000}]}')
    Path("w.yaml").write_text(
        "data: {type: shared_prefix, shared_prefix: {num_groups: 1, num_prompts_per_group: 1, system_prompt_len: 16, "
        "question_len: 16, output_len: 500}}\nload: {type: constant, stages: [{rate: 1, duration: 5}]}\n"
    )
    return tmp_path


@pytest.mark.usefixtures("folder")
def test_columns_stay_apart_above_a_hundred_seconds() -> None:
    done = CliRunner().invoke(app, SIMULATE)
    assert done.exit_code == 0
    (line,) = (line for line in done.stderr.splitlines() if line.startswith("overall  e2e"))
    assert [float(cell.replace(",", "")) > 100_000 for cell in line.split()[2:]] == [True] * 4


@pytest.mark.usefixtures("folder")
def test_quiet_says_nothing_but_errors() -> None:
    done = CliRunner().invoke(app, [*SIMULATE, "--quiet", "--json", "out.json"])
    assert (done.exit_code, done.stdout, done.stderr) == (0, "", "")
    assert Path("out.json").exists()
    assert "Error" in CliRunner().invoke(app, [*SIMULATE, "--quiet", "--tp", "3"]).stderr


@pytest.mark.usefixtures("folder")
def test_a_full_disk_behind_standard_output_is_an_error() -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "stepcal", *SIMULATE, "--json", "-", "-q"],
            check=False,
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
        )
    assert done.returncode == 2
    assert done.stderr == "Error: Cannot write to standard output: No space left on device.\n"


@pytest.mark.usefixtures("folder")
def test_without_a_terminal_there_are_no_colours_and_no_bar() -> None:
    for more in ([], ["--tp", "3"]):
        done = subprocess.run(
            [sys.executable, "-m", "stepcal", *SIMULATE, *more], capture_output=True, text=True, check=False
        )
        assert "\x1b" not in done.stdout + done.stderr
        assert "\r" not in done.stderr


def test_the_shell_can_complete_commands() -> None:
    assert "--install-completion" in CliRunner().invoke(app, ["--help"]).stdout


def test_json_has_null_for_what_it_cannot_say(capsys) -> None:
    emit({"a": float("nan"), "b": [float("inf"), 1.0]}, "-", "")
    assert capsys.readouterr().out == '{\n  "a": null,\n  "b": [\n    null,\n    1.0\n  ]\n}\n'


def on_a_terminal(arguments: list[str]) -> bytes:
    """What a command writes to a terminal of 100 columns."""
    import fcntl
    import os
    import pty
    import struct
    import termios

    child, terminal = pty.fork()
    if child == 0:
        fcntl.ioctl(2, termios.TIOCSWINSZ, struct.pack("HHHH", 30, 100, 0, 0))
        os.execv(sys.executable, [sys.executable, "-m", "stepcal", *arguments])
    written = b""
    try:
        while part := os.read(terminal, 1 << 16):
            written += part
    except OSError:  # the child has closed it
        pass
    os.waitpid(child, 0)
    return written


@pytest.mark.usefixtures("folder")
@pytest.mark.filterwarnings("ignore:.*use of forkpty.*")
def test_on_a_terminal_errors_are_coloured_and_short_work_has_no_bar() -> None:
    assert b"\x1b[31mError:\x1b[0m" in on_a_terminal([*SIMULATE, "--tp", "3"])
    assert b"requests/s]" not in on_a_terminal(SIMULATE)
