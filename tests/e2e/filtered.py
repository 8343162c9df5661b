"""Puts a seccomp profile of the OCI runtimes in force, as a runtime does, and becomes another program.

    python filtered.py PROFILE errno|kill COMMAND [ARGUMENT]...

`errno` is as it stands in the profile; with `kill`, what it does not mention ends the process by SIGSYS instead, so
that nothing can be refused unnoticed. Wants no_new_privs, or CAP_SYS_ADMIN.
"""

from __future__ import annotations

import ctypes
import json
import os
import sys
from pathlib import Path
from typing import Any

# seccomp.h of libseccomp 2.5.
_ALLOW, _KILL_PROCESS, _ERRNO = 0x7FFF0000, 0x80000000, 0x00050000
_COMPARISONS = {"SCMP_CMP_EQ": 4, "SCMP_CMP_MASKED_EQ": 7}


class _Condition(ctypes.Structure):
    _fields_ = (
        ("index", ctypes.c_uint),
        ("comparison", ctypes.c_int),
        ("value", ctypes.c_uint64),
        ("second", ctypes.c_uint64),
    )


def enforce(profile: dict[str, Any], *, kill: bool) -> None:
    """Put it in force for this process and all that come of it."""
    library = ctypes.CDLL("libseccomp.so.2", use_errno=True)
    library.seccomp_init.restype = ctypes.c_void_p
    library.seccomp_load.argtypes = [ctypes.c_void_p]
    add = library.seccomp_rule_add_array
    add.argtypes = [ctypes.c_void_p, ctypes.c_uint32, ctypes.c_int, ctypes.c_uint, ctypes.c_void_p]
    assert profile["defaultAction"] == "SCMP_ACT_ERRNO"
    default = _KILL_PROCESS if kill else _ERRNO | profile["defaultErrnoRet"]
    context = library.seccomp_init(ctypes.c_uint32(default))
    for rule in profile["syscalls"]:
        action = _ALLOW if rule["action"] == "SCMP_ACT_ALLOW" else _ERRNO | rule["errnoRet"]
        # libseccomp refuses a rule that says what happens anyway.
        for name in rule["names"] if action != default else ():
            number = library.seccomp_syscall_resolve_name(name.encode())
            conditions = [
                _Condition(one["index"], _COMPARISONS[one["op"]], one["value"], one["valueTwo"])
                for one in rule.get("args", [])
            ]
            failed = add(context, action, number, len(conditions), (_Condition * len(conditions))(*conditions))
            # Below zero are the numbers that libseccomp makes up for calls of other processors.
            assert number < 0 or not failed, f"{name}: {failed}"
    failed = library.seccomp_load(context)
    assert not failed, os.strerror(-failed)


if __name__ == "__main__":
    _, file, action, *command = sys.argv
    enforce(json.loads(Path(file).read_text(encoding="utf-8")), kill=action == "kill")
    os.execvp(command[0], command)  # noqa: S606  (that is what it is for)
