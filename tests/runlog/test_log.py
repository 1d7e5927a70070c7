"""The console: a live line on a terminal, plain lines anywhere else."""

import os
import pty
import subprocess
import sys
import termios

PROGRAM = """
from mambair_ds.runlog.log import LIVE, Progress, log_to_console
logger = log_to_console(0)
progress = Progress("tiny", 4, 10, show=True)
for i in range(5, 8):
    progress.step()
progress.say("loss 1.000e-02")
logger.info("step 7", extra=LIVE)
logger.warning("look out")
progress.close()
"""


def on_a_terminal(**environment: str) -> str:
    main, other = pty.openpty()
    termios.tcsetwinsize(other, (24, 100))
    variables = {k: v for k, v in os.environ.items() if k != "NO_COLOR"} | {"TERM": "xterm"} | environment
    subprocess.run([sys.executable, "-c", PROGRAM], stdout=other, stderr=other, env=variables, check=True)
    os.close(other)
    said = b""
    while True:
        try:
            part = os.read(main, 65536)
        except OSError:  # how Linux says that the other side is closed
            break
        if not part:
            break
        said += part
    os.close(main)
    return said.decode()


def test_a_terminal_has_a_live_line_instead_of_step_lines() -> None:
    said = on_a_terminal()
    assert "\r" in said
    assert "7/10" in said
    assert "loss 1.000e-02" in said
    assert "step 7" not in said
    assert "\x1b[33m" in said


def test_no_color_is_respected() -> None:
    said = on_a_terminal(NO_COLOR="1")
    assert "look out" in said
    assert "\x1b[3" not in said


def test_a_file_has_plain_lines_only() -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True)
    assert [line.split(": ")[1] for line in done.stdout.splitlines()] == ["step 7", "look out"]
    assert "\r" not in done.stdout + done.stderr
