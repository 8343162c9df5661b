"""Which kernel modules are there, and that what is not there is never asked for."""

from __future__ import annotations

import contextlib
import os
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.kernel.files import ParseError, Reason, Roots, Unavailable
from shoal.kernel.modules import parse_modules, require_module

if TYPE_CHECKING:
    from pathlib import Path

LOADED = b"""nf_conntrack_netlink 53248 0 - Live 0x0000000000000000
nf_conntrack 188416 4 xt_conntrack,nf_nat,nf_conntrack_netlink,xt_MASQUERADE, Live 0x0000000000000000
"""


def roots_with(tmp_path: Path, modules: bytes | None, built_in: str | None = None) -> Roots:
    """Return roots with this /proc/modules and this list of what was built in, or without them."""
    (tmp_path / "proc").mkdir()
    if modules is not None:
        (tmp_path / "proc/modules").write_bytes(modules)
    if built_in is not None:
        directory = tmp_path / "lib/modules" / os.uname().release
        directory.mkdir(parents=True)
        (directory / "modules.builtin").write_text(built_in)
    return Roots(f"{tmp_path}/proc", f"{tmp_path}/sys", str(tmp_path))


def test_the_names_are_the_first_words() -> None:
    """A module that another one merely names as its user is not thereby loaded."""
    assert parse_modules(LOADED) == {"nf_conntrack_netlink", "nf_conntrack"}
    assert parse_modules(b"") == frozenset()


def test_a_loaded_module_may_be_asked(tmp_path: Path) -> None:
    """It is in the list."""
    require_module(roots_with(tmp_path, LOADED), "nf_conntrack_netlink")


def test_a_built_in_module_may_be_asked(tmp_path: Path) -> None:
    """It is never in the list; the distribution says that it was built in, with either kind of dash."""
    listed = "kernel/net/netfilter/nf_conntrack.ko\nkernel/net/netfilter/nf-conntrack-netlink.ko\n"
    require_module(roots_with(tmp_path, b"", listed), "nf_conntrack_netlink")


def test_a_kernel_without_modules_may_be_asked(tmp_path: Path) -> None:
    """There is nothing that it could load."""
    require_module(roots_with(tmp_path, None), "nf_tables")


@pytest.mark.parametrize("built_in", [None, "", "kernel/net/netfilter/nf_tables_extra.ko\n"])
def test_what_is_not_known_to_be_there_is_not_asked(tmp_path: Path, built_in: str | None) -> None:
    """A module that is only another one's user, or part of another name, is not there."""
    with pytest.raises(Unavailable, match="nf_tables is not loaded") as caught:
        require_module(roots_with(tmp_path, b"nft_x 1 1 nf_tables, Live 0x0\n", built_in), "nf_tables")
    assert caught.value.reason is Reason.NOT_IN_KERNEL


@given(st.binary(max_size=300))
def test_no_bytes_break_the_parser(data: bytes) -> None:
    """Arbitrary bytes are names or a ParseError."""
    with contextlib.suppress(ParseError):
        assert all(parse_modules(data)) or b"\n" in data
