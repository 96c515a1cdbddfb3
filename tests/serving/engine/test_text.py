"""Text as it grows: whole characters, nothing past a stop string, nothing lost."""

from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from adapterhub_lite.serving import GenerationRequest, InferenceEngine
from adapterhub_lite.serving.engine.text import StopString, TextStream


def pieces(tokenizer: Any, text: bytes, stop: tuple[str, ...] = ()) -> tuple[list[str], TextStream]:
    stream = TextStream(tokenizer, stop)
    given_out = []
    for token in tokens_of(tokenizer, text):
        given_out.append(stream.push(token))
        if stream.stopped:
            break
    given_out.append(stream.finish())
    return given_out, stream


def tokens_of(tokenizer: Any, text: bytes) -> list[int]:
    from tokenizers import pre_tokenizers

    # The byte-level alphabet: printable bytes stand for themselves, the others are moved up.
    kept = [*range(33, 127), *range(161, 173), *range(174, 256)]
    moved = iter(range(256, 512))
    names = {byte: chr(byte) if byte in kept else chr(next(moved)) for byte in range(256)}
    assert set(names.values()) == set(pre_tokenizers.ByteLevel.alphabet())
    return [tokenizer.convert_tokens_to_ids(names[byte]) for byte in text]


@settings(max_examples=100, deadline=None)
@given(text=st.text(max_size=20))
def test_pieces_make_the_whole(byte_tokenizer: Any, text: str) -> None:
    given_out, stream = pieces(byte_tokenizer, text.encode())
    assert "".join(given_out) == stream.text == text
    assert not any("�" in piece for piece in given_out) or "�" in text


@settings(max_examples=100, deadline=None)
@given(raw=st.binary(max_size=12))
def test_bytes_that_are_no_text_decode_as_they_would_in_one_go(byte_tokenizer: Any, raw: bytes) -> None:
    given_out, _ = pieces(byte_tokenizer, raw)
    assert "".join(given_out) == byte_tokenizer.decode(tokens_of(byte_tokenizer, raw))


@settings(max_examples=200, deadline=None)
@given(text=st.text("abc", max_size=20), stop=st.lists(st.text("abc", min_size=1, max_size=4), min_size=1, max_size=3))
def test_nothing_past_the_first_stop_string(byte_tokenizer: Any, text: str, stop: list[str]) -> None:
    given_out, stream = pieces(byte_tokenizer, text.encode(), tuple(stop))
    # The answer ends with the token that completes a stop string: of those complete then, the earliest counts.
    ends = [end for end in range(len(text) + 1) if any(s in text[:end] for s in stop)]
    wanted = min(text[: ends[0]].find(s) for s in stop if s in text[: ends[0]]) if ends else len(text)
    assert "".join(given_out) == stream.text == text[:wanted]
    assert stream.stopped == bool(ends)


@settings(max_examples=300, deadline=None)
@given(text=st.text("ab", max_size=40), stop=st.text("ab", min_size=1, max_size=12))
def test_a_stop_string_is_followed_as_searching_would(text: str, stop: str) -> None:
    follower = StopString(stop)
    for end, character in enumerate(text, 1):
        ends = follower.advance(character)
        assert ends == text[:end].endswith(stop)
        if ends:
            return
        begun = [n for n in range(min(end, len(stop) - 1) + 1) if stop.startswith(text[end - n : end])]
        assert follower.matched == max(begun)


def test_long_stop_strings_cost_no_more_than_short_ones() -> None:
    """Counted, not timed: what a text costs grows with its length, not with that of the stop strings."""

    def reads(length: int) -> int:
        counted = CountedText("a" * (length - 1) + "b")
        follower = StopString(counted)
        for character in "a" * 2000:
            follower.advance(character)
        return counted.reads

    assert reads(60_000) <= 6 * 2000 and reads(1000) <= 8 * 2000


class CountedText(str):
    """A text that counts how often one of its characters is read."""

    reads = 0

    def __getitem__(self, key: Any) -> str:
        self.reads += 1
        return super().__getitem__(key)


def test_stop_string_ends_the_answer(engine: InferenceEngine) -> None:
    free = engine.generate(GenerationRequest(prompt="stop here", max_new_tokens=30))
    stop = free.text[3:5]
    result = engine.generate(GenerationRequest(prompt="stop here", max_new_tokens=30, stop=stop))
    assert result.text == free.text[: free.text.find(stop)] and result.finish_reason == "stop"
    assert len(result.token_ids) < len(free.token_ids)
    chunks = list(engine.stream(GenerationRequest(prompt="stop here", max_new_tokens=30, stop=(stop,))))
    assert "".join(chunk.text for chunk in chunks) == result.text
