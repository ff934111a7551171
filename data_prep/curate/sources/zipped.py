"""Zip archives of others, member by member in memory: no path of theirs ever becomes one of ours."""

from __future__ import annotations

import io
import zipfile
import zlib
from typing import Any

from data_prep.curate.sources.encodings import EncodingLimits, refuse_bomb
from megatron_sov.base.documents import BadRecord

MAX_MEMBERS = 20_000
_BLOCK_BYTES = 1 << 20


class Archive:
    """The members of an archive, read within limits."""

    def __init__(self, data: bytes, limits: EncodingLimits) -> None:
        """Read its list of members.

        Raises:
            BadRecord: it is no archive, or has too many.
        """
        self._packed_bytes, self._limits = len(data), limits
        self._unpacked_bytes = 0
        try:
            self._zip = zipfile.ZipFile(io.BytesIO(data))
        except (zipfile.BadZipFile, ValueError, EOFError, NotImplementedError) as e:
            raise BadRecord("zip", f"is no archive, or only a part of one ({str(e)[:120]}); fetch it again"
                            ) from None
        self.names = frozenset(self._zip.namelist())
        if len(self.names) > MAX_MEMBERS:
            raise BadRecord("too_long", f"has {len(self.names):,} members, of at most {MAX_MEMBERS:,}; leave "
                                        "it out")

    def read(self, name: str) -> bytes:
        """Return a member.

        Raises:
            BadRecord: it is not there, damaged or locked, or all together unpack to too much.
        """
        parts = []
        try:
            with self._zip.open(name) as member:
                while block := member.read(_BLOCK_BYTES):
                    self._unpacked_bytes += len(block)
                    refuse_bomb(self._packed_bytes, self._unpacked_bytes, self._limits.unpacked_bytes)
                    parts.append(block)
        except KeyError:
            raise BadRecord("zip", f"has no member {name[:200]!r}; fetch it again") from None
        except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError, NotImplementedError) as e:
            raise BadRecord("zip", f"has a member {name[:200]!r} that is damaged or locked ({str(e)[:120]}); "
                                   "fetch it again") from None
        return b"".join(parts)

    def tree(self, name: str) -> Any:
        """Return the root of a member that is XML; its entities stay unread.

        Raises:
            BadRecord: as `read`; or it is no XML.
        """
        return xml_tree(self.read(name), name)


def xml_tree(data: bytes, name: str) -> Any:
    """Return the root of an XML document: no entity is replaced, nothing fetched, no DTD read.

    Raises:
        BadRecord: it is none.
    """
    from lxml import etree

    parser = etree.XMLParser(resolve_entities=False, no_network=True, load_dtd=False, huge_tree=False,
                             remove_comments=True, remove_pis=True)
    try:
        return etree.fromstring(data, parser)
    except (etree.XMLSyntaxError, ValueError) as e:
        raise BadRecord("xml", f"has {name[:200]!r}, which is no XML ({str(e)[:120]}); fetch it again"
                        ) from None


def local(element: Any) -> str:
    """Return an element's name without its namespace."""
    tag = element.tag
    return tag.rpartition("}")[2] if isinstance(tag, str) else ""
