"""Who holds a lock file, and whose files stay as they are."""

import os
import signal
import subprocess
import sys

import pytest

from gptq_core.errors import InputError, OutputHeldError
from gptq_core.runtime.lock import hold

HOLDER = """
import sys, time
from pathlib import Path
from gptq_core.runtime.lock import hold
lock = hold(Path(sys.argv[1]), "dir")
print("held", flush=True)
time.sleep(600)
"""


def test_another_process_holds_it_until_it_is_killed(tmp_path):
    path = tmp_path / "made" / "out.lock"
    with subprocess.Popen([sys.executable, "-c", HOLDER, path], stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout.readline() == "held\n"
            with pytest.raises(OutputHeldError, match=rf"^dir = 'out' is held by process {process.pid}; wait for it"):
                hold(path, "dir = 'out'")
            assert path.read_text() == f"process {process.pid}\n", "who fails to get it changes nothing"
        finally:
            process.send_signal(signal.SIGKILL)
    hold(path, "dir = 'out'").close()
    assert path.read_text() == f"process {os.getpid()}\n"
    hold(path, "dir = 'out'").close()


@pytest.mark.parametrize("text", ["mine\n", "process 7 is mine\n", "process 7\n" * 9])
def test_a_file_of_something_else_stays_and_is_free_again(text, tmp_path):
    path = tmp_path / "out.lock"
    path.write_text(text)
    for _ in range(2):
        with pytest.raises(InputError, match="holds something else; move it away"):
            hold(path, "dir")
    assert path.read_text() == text


@pytest.mark.parametrize("target", ["target", "absent"])
def test_a_link_is_not_followed(target, tmp_path):
    (tmp_path / "target").write_text("")
    (tmp_path / "out.lock").symlink_to(tmp_path / target)
    with pytest.raises(InputError, match=r"dir: .*out\.lock cannot be locked \(.*; choose another folder"):
        hold(tmp_path / "out.lock", "dir")
    assert (tmp_path / "target").read_text() == "" and not (tmp_path / "absent").exists()


def test_a_folder_in_its_place(tmp_path):
    (tmp_path / "out.lock").mkdir()
    with pytest.raises(InputError, match="cannot be locked"):
        hold(tmp_path / "out.lock", "dir")
