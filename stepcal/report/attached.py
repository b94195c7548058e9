"""The processes that a build starts: a kernel for a notebook, a study, the renderer. Each ends when the build is gone.

They run in sessions of their own, so neither Ctrl-C nor a kill of the build reaches them; they look after their parent
themselves. ``python -m stepcal.report.attached kernel|study|render ...``
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time

POLL_S = 0.25


def end_with_parent() -> None:
    """End this process, and what it started, within a moment of its parent's end, however that came."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(POLL_S)
        if os.getpgrp() == os.getpid():
            os.killpg(os.getpid(), signal.SIGKILL)
        os._exit(1)

    threading.Thread(target=watch, name="end-with-parent", daemon=True).start()


def main(arguments: list[str]) -> None:
    """Do what the first argument names with the others."""
    end_with_parent()
    kind, *rest = arguments
    if kind == "kernel":
        from ipykernel.kernelapp import launch_new_instance

        launch_new_instance(argv=rest)
    elif kind == "study":
        from stepcal.studies.registry import load_study

        name, source = rest
        load_study(name, source=source)
    elif kind == "render":
        from jupyter_book.cli.main import main as jupyter_book

        jupyter_book(rest)
    else:
        raise SystemExit(f"unknown kind of process `{kind}`")


if __name__ == "__main__":
    main(sys.argv[1:])
