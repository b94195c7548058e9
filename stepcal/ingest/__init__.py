"""Files that load generators wrote, to request tables of one definition with a manifest of where each came from."""

from stepcal.ingest.formats import Format, Options, UnreadableError
from stepcal.ingest.ingestion import MANIFEST, Manifest, ingest
from stepcal.ingest.mapped import read_mapping
from stepcal.ingest.request_log import SCHEMA, Rejected, Request, request_log_columns
from stepcal.ingest.tools import FORMATS, definitions_table, format_of

__all__ = [
    "FORMATS",
    "MANIFEST",
    "SCHEMA",
    "Format",
    "Manifest",
    "Options",
    "Rejected",
    "Request",
    "UnreadableError",
    "definitions_table",
    "format_of",
    "ingest",
    "read_mapping",
    "request_log_columns",
]
