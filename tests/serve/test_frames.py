"""The reader of one websocket, without a socket: any cut of the bytes gives the same messages, one at a time."""

from __future__ import annotations

import random

from websockets.frames import Frame, Opcode

from defi_platform.serve.connections.frames import MAX_FRAGMENTS, MessageReader, shorten_reason


def stream(draws: random.Random, messages: list[bytes | str]) -> bytes:
    """Frames of messages: in random fragments, with pings between them."""
    frames = []
    for message in messages:
        data = message.encode() if isinstance(message, str) else message
        cuts = sorted(draws.randrange(len(data) + 1) for _ in range(draws.randrange(4)))
        parts = [data[a:b] for a, b in zip([0, *cuts], [*cuts, len(data)], strict=True)]
        for number, part in enumerate(parts):
            first = Opcode.TEXT if isinstance(message, str) else Opcode.BINARY
            last = number == len(parts) - 1
            frames.append(Frame(Opcode.CONT if number else first, part, last).serialize(mask=True))
            if draws.random() < 0.2:
                frames.append(Frame(Opcode.PING, b"?").serialize(mask=True))
    return b"".join(frames)


def test_messages_survive_every_cut_and_every_move_to_another_reader() -> None:
    for seed in range(300):
        draws = random.Random(seed)
        messages: list[bytes | str] = [
            draws.randbytes(draws.choice([0, 1, 125, 126, 5000]))
            if draws.random() < 0.7
            else "ü" * draws.randrange(9)
            for _ in range(draws.randrange(1, 8))
        ]
        data, read = stream(draws, messages), []
        reader, at = MessageReader(2**20), 0
        while at < len(data) or reader.message is not None:
            step = draws.choice([1, 3, 50, 300, 10_000])
            if reader.message is None:
                assert at < len(data), f"seed {seed}: the reader waits, but everything has come"
                reader.receive_data(data[at : at + step])
                at += step
            elif draws.random() < 0.3 and at < len(data):
                reader.receive_data(data[at : at + step])  # ahead of the answer: stays unread
                at += step
            else:
                read.append(reader.message)
                reader.forget_message()
                if draws.random() < 0.3:
                    assert reader.at_boundary
                    successor = MessageReader(2**20)
                    successor.restore(None, reader.unread)
                    reader = successor
                else:
                    reader.release()
        assert read == messages and reader.is_open, f"seed {seed}"
        assert reader.held_bytes == 0


def test_a_message_being_answered_is_counted_until_it_is_forgotten() -> None:
    reader = MessageReader(2**20)
    reader.receive_data(Frame(Opcode.BINARY, bytes(1000)).serialize(mask=True) * 2)
    assert reader.message == bytes(1000) and reader.full and reader.held_bytes == 2008
    reader.forget_message()
    assert reader.held_bytes == 1008
    reader.release()
    assert reader.message == bytes(1000) and not reader.full
    reader.release()
    assert reader.message is None and reader.held_bytes == 0 and reader.at_boundary


def test_noise_never_raises_and_ends_in_a_close_frame() -> None:
    draws, closed = random.Random(0), 0
    for _ in range(3000):
        reader = MessageReader(4096)
        for _ in range(4):
            reader.receive_data(draws.randbytes(draws.randrange(1, 200)))
            if reader.message is not None:
                reader.release()
            assert reader.held_bytes < 6000
        closed += not reader.is_open
        assert reader.is_open or reader.data_to_send()[-1] == b""
    assert closed > 2500


def test_limits_of_fragments_and_reasons() -> None:
    reader = MessageReader(2**20)
    crumb = Frame(Opcode.CONT, b"", False).serialize(mask=True)
    reader.receive_data(Frame(Opcode.BINARY, b"", False).serialize(mask=True) + crumb * (MAX_FRAGMENTS - 1))
    assert reader.is_open
    reader.receive_data(crumb)
    assert not reader.is_open and reader.close_sent is not None and reader.close_sent.code == 1008
    assert shorten_reason("short") == "short"
    assert len(shorten_reason("ü" * 100).encode()) <= 123
