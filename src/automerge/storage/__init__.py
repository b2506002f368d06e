"""Files and objects, near and far, by URI: ``s3://bucket/key``, ``file:///path``, or a plain path."""

from automerge.storage.objects import DownloadedFile, ObjectInfo
from automerge.storage.record import FetchRecord
from automerge.storage.store import download, fetch, fetch_all, list_objects, read_range, schemes, upload

__all__ = [
    "DownloadedFile",
    "FetchRecord",
    "ObjectInfo",
    "download",
    "fetch",
    "fetch_all",
    "list_objects",
    "read_range",
    "schemes",
    "upload",
]
