"""Windows, tried from Linux: every module is imported again while what only POSIX has is hidden."""

from __future__ import annotations

import enum
import importlib
import os
import pkgutil
import signal
import sys
from pathlib import Path

import leapalign
from leapalign.lookup.recipes import load_file

PROCESSES = load_file(str(Path(__file__).parents[1] / "training" / "processes.py"))
MODULES = ["fcntl", "grp", "pty", "pwd", "resource", "syslog", "termios", "tty"]
OF_OS = ["fork", "getuid", "getpgid", "killpg", "mkfifo", "pread", "pwrite", "sched_getaffinity", "setsid", "statvfs"]
OF_OS += ["sysconf", "sysconf_names", "uname", "O_CLOEXEC", "O_NONBLOCK", "register_at_fork"]
OF_SIGNAL = ["SIGHUP", "SIGUSR1", "SIGUSR2", "SIGALRM", "SIGKILL", "SIGPIPE", "SIGQUIT", "pthread_sigmask"]


def import_all() -> int:
    names = [module.name for module in pkgutil.walk_packages(leapalign.__path__, "leapalign.")]
    return len([importlib.import_module(name) for name in names if not name.endswith("__main__")])


def import_as_on_windows() -> int:
    import_all()  # with the libraries, which look after themselves
    for name in [name for name in sys.modules if name.partition(".")[0] == "leapalign"]:
        del sys.modules[name]
    sys.modules.update(dict.fromkeys(MODULES))  # None: ModuleNotFoundError
    for place, names in ((os, OF_OS), (signal, OF_SIGNAL)):
        for name in names:
            delattr(place, name)
    signal.Signals = enum.IntEnum("Signals", {"SIGINT": 2, "SIGTERM": 15})
    assert import_all() > 100
    return len(importlib.import_module("leapalign.training.preemption").SIGNALS)


def test_nothing_that_only_posix_has_is_needed_at_import(tmp_path):
    status, said = PROCESSES.fork(import_as_on_windows, tmp_path / "log").wait()
    assert status == 2, said
