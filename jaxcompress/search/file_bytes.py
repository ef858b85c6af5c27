"""What files of plans take: exactly for one plan, and as a sum over sites for the allocation.

Codes and scales are sums over the sites. The header is not: a scheme stands once for all leaves
that share it, numbers have digits. So sites get what is theirs, their arrays and the entries of the
header that only they have, and the rest lies between two bounds.
"""

import json
from collections.abc import Mapping
from typing import Any, NamedTuple

from jaxcompress.core.packed import Grid, is_packed, packed_bytes
from jaxcompress.core.paths import leaves_with_paths
from jaxcompress.core.storage import Contents, contents

_DIGITS = 8  # of offsets and numbers of schemes, by which the entries of one site may differ
_PADDING = 16


class FileBytes(NamedTuple):
    """The bytes of a file as a sum.

    Attributes:
      sites: {site: {option: bytes}}.
      least, most: of all that is not of one site.
    """

    sites: dict[str, dict[str, int]]
    least: int
    most: int


def file_sums(packed: Mapping[str, Any], sites: list[str], grids: Mapping[str, Grid]) -> FileBytes:
    """What files of mixed options take, from the trees of one option each."""
    found: dict[str, dict[str, int]] = {site: {} for site in sites}
    rests, kinds = [], set()
    for option, tree in packed.items():
        whole = contents(tree, activations=grids)
        for path, leaf in leaves_with_paths(tree, is_leaf=is_packed):
            if path in found:
                found[path][option] = packed_bytes(leaf) + _entries(whole, path)
        rests.append(whole.size.file_bytes - sum(own[option] for own in found.values()))
        kinds |= set(_table(whole).partition(">")[0].split(";"))
    slack = _PADDING + _DIGITS * len(sites)
    return FileBytes(
        found, min(rests) - slack, max(rests) + slack + sum(len(kind) + 1 for kind in kinds)
    )


def _table(whole: Contents) -> str:
    return whole.header.get("__metadata__", {}).get("leaves", "")


def _entries(whole: Contents, path: str) -> int:
    """Bytes of the header for arrays that only a leaf has; those in pools have none."""
    own = {
        name: entry
        for name, entry in whole.header.items()
        if name == path or name.startswith(f"{path}.")
    }
    return sum(
        len(json.dumps({name: entry}, separators=(",", ":"))) - 1 for name, entry in own.items()
    )
