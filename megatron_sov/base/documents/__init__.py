"""Read users' text (files, JSONL, Parquet, folders) as a stream of documents, in bounded memory and fixed
order.

A text file is one document; above `WHOLE_FILE_BYTES` it is cut at blank lines into documents of at most
`DOCUMENT_BYTES`. A line of a `.jsonl` file or a row of a `.parquet` file is one record: text, chat,
preference or prompt. All text formats may be compressed (`.gz`, `.zst`).
"""

from megatron_sov.base.documents.files import (
    DOCUMENT_BYTES, TEXT_SUFFIXES, WHOLE_FILE_BYTES, FileSpan, cut_at_blank_lines, cut_text, list_files,
    plan_units)
from megatron_sov.base.documents.layouts import KINDS
from megatron_sov.base.documents.messages import ROLES, BadRecord, Conversation, Message
from megatron_sov.base.documents.reading import read_documents, read_span
from megatron_sov.base.documents.records import ROLLOUTS, Document, LeftOut, RecordReading

__all__ = [
    "DOCUMENT_BYTES", "KINDS", "ROLES", "ROLLOUTS", "TEXT_SUFFIXES", "WHOLE_FILE_BYTES", "BadRecord",
    "Conversation", "Document", "FileSpan", "LeftOut", "Message", "RecordReading", "cut_at_blank_lines",
    "cut_text", "list_files", "plan_units", "read_documents", "read_span"]
