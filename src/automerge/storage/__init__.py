"""Files and objects, near and far, by URI: ``s3://bucket/key``, ``file:///path``, or a plain path."""

from automerge.storage.objects import DownloadedFile, ObjectInfo, StoredObject
from automerge.storage.record import FetchRecord
from automerge.storage.store import (
    check_scheme,
    download,
    fetch,
    fetch_all,
    find_object,
    list_objects,
    read_object,
    read_range,
    schemes,
    upload,
    write_object,
)

__all__ = [
    "DownloadedFile",
    "FetchRecord",
    "ObjectInfo",
    "StoredObject",
    "check_scheme",
    "download",
    "fetch",
    "fetch_all",
    "find_object",
    "list_objects",
    "read_object",
    "read_range",
    "schemes",
    "upload",
    "write_object",
]
