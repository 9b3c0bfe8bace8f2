"""A moto server with a bucket that is full before it answers: `python filled_s3_server.py BUCKET COUNT -H HOST -p PORT`.

Sending ten thousand objects takes a minute; what is asked of the server afterwards is the same.
"""

from __future__ import annotations

import sys

from moto.core.models import DEFAULT_ACCOUNT_ID
from moto.s3.models import s3_backends
from moto.server import main


def fill(bucket: str, count: int) -> None:
    """Objects v/00000.mp4 and so on, of one byte each."""
    backend = s3_backends[DEFAULT_ACCOUNT_ID]["aws"]
    backend.create_bucket(bucket, "us-east-1")
    for number in range(count):
        backend.put_object(bucket, f"v/{number:05d}.mp4", b"x", disable_notification=True)


if __name__ == "__main__":
    fill(sys.argv[1], int(sys.argv[2]))
    main(sys.argv[3:])
