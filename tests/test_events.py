"""Listeners observe: a broken one is switched off and named, and nobody else misses an event."""

from chimera_cli.events import Event, Note, Progress, broadcast

EVENT = Progress("packing", 1, 2)


def broken(_event: Event) -> None:
    raise RuntimeError("out of order")


def test_two_broken_listeners_cost_nobody_an_event() -> None:
    heard: list[Event] = []

    def also_broken(_event: Event) -> None:
        raise ValueError("me too")

    tell = broadcast([broken, also_broken, heard.append])
    tell(EVENT)
    tell(EVENT)
    assert [event for event in heard if event == EVENT] == [EVENT, EVENT]
    notes = [event.message for event in heard if isinstance(event, Note)]
    assert len(notes) == 2
    assert any("broken failed and was switched off: RuntimeError: out of order" in note for note in notes)
