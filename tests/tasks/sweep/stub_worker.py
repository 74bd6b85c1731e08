"""Stand-in for tasks.sweep.worker: the same JSON lines in and out, without torch. A job says by its `do` what becomes of it."""

import json
import os
import signal
import sys
import time


def say(**event):
    print(json.dumps(event), flush=True)


say(event="ready", pid=os.getpid())
for line in sys.stdin:
    job = json.loads(line)
    match job["do"]:
        case "finish":
            say(event="stage", text="stub")
            say(event="progress", text="block 1/1")
            say(event="outcome", outcome={"status": "done", "pid": os.getpid()})
        case "refuse":
            say(event="outcome", outcome={"status": job["status"], "error": "InputError: the stub refuses"})
        case "hang":
            time.sleep(600)
        case "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        case "bug":
            raise ValueError("the stub has a bug")
