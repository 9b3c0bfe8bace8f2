"""Reasons for rejecting a video, kinds of notes on usable ones: closed lists, and the error that carries a reason."""

from __future__ import annotations

from typing import Final

REASONS: Final[dict[str, str]] = {
    "missing": "the source names a file that is not there",
    "changed": "the file is another one than at the ingest; run the ingest again",
    "empty": "the file has no bytes",
    "not_video": "text, HTML or other content under a video's name",
    "lfs_pointer": "a Git LFS pointer instead of the file; run `git lfs pull` in the source",
    "no_video_stream": "a media file without a picture, such as audio only",
    "unreadable": "the container cannot be opened, for example because its index is missing",
    "short": "fewer frames than the container, the annotation or the episode promises",
    "corrupt": "frames in it fail to decode",
    "too_short": "fewer than two frames, or seconds than the corpus asks for",
    "memory": "needs more memory than decode.memory_mb",
    "timeout": "took longer than decode.timeout_s",
    "crash": "killed the process that decoded it",
    "storage": "its store failed, also when asked again",
    "bad_source": "the source's own description of it cannot be read",
    "no_text": "the source gives it no instruction",
    "too_long": "more frames than the corpus allows",
    "static": "nothing moves",
    "black": "the picture is dark throughout",
    "blurred": "the picture is not sharp enough",
    "duplicate": "nearly the same as another video of the corpus",
}
"""Reason -> what it means, as shown to the user."""


NOTES: Final[dict[str, str]] = {
    "no_text": "usable, but without an instruction",
    "unmatched": "texts or labels that fit no video",
    "ambiguous": "texts or labels that fit several videos, so none of them got one",
    "repeated": "lines, rows or labels that come twice; the last counts",
    "changing_text": "the text changes within the video; the first one is used",
    "skipped": "parts of the source that are left out",
    "bad_actions": "usable, but for its actions or states",
}
"""What an ingest counts besides videos and rejections: kind -> what it means, as shown to the user."""

TRANSIENT_REASON = "storage"
"""The one reason that does not lie in the file: such videos are opened again by every ingest."""


class BadVideo(Exception):
    """A video that cannot be used.

    Args:
        reason: one of `REASONS`.
        message: what exactly happened, for the quarantine table.
    """

    def __init__(self, reason: str, message: str) -> None:
        assert reason in REASONS, reason
        super().__init__(f"{reason}: {message}")
        self.reason = reason
        self.message = message

    def __reduce__(self) -> tuple[type[BadVideo], tuple[str, str]]:
        return BadVideo, (self.reason, self.message)
