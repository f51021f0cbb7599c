"""The language model as a proposer, against real HTTP servers on this machine that answer well, badly, or not at all."""

import json
import socket
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from chat_server import Answer, ChatServer, Raw, clever, reply, shown, useless
from hypothesis import given
from hypothesis import strategies as st
from proposer_contract import NUM_DIMENSIONS, ProposerContract, box
from pydantic import ValidationError

from evomerge.errors import DataError
from evomerge.proposers import llm_prompt
from evomerge.proposers.cma_es import CmaEs, CmaEsOptions
from evomerge.proposers.llm import DECAY, LEAST_SIGMA, LONGEST_REST, NUM_STARTUP, Llm, LlmOptions
from evomerge.proposers.llm_prompt import read_means, write_prompt
from evomerge.proposers.proposer import Problem
from evomerge.records import Candidate, Observation
from evomerge.space.space import Dimension

TARGET = 0.7


def make(server: ChatServer | str, num_dimensions: int = 3, **options: Any) -> Llm:
    url = server if isinstance(server, str) else server.url
    problem = Problem(dimensions=box(0.25, num_dimensions), num_objectives=1, seed=(0, 0))
    return Llm(problem, LlmOptions(url=url, model="m", **options))


def value_of(candidate: Candidate) -> float:
    return -float(((np.array(candidate.point) - TARGET) ** 2).sum())


def observe(index: int, candidate: Candidate) -> Observation:
    return Observation(index=index, point=np.array(candidate.point), values_M=np.array([value_of(candidate)]))


def run(proposer: Llm, num_asks: int) -> list[Candidate]:
    candidates: list[Candidate] = []
    for index in range(num_asks):
        candidates += proposer.ask(1, [])
        proposer.tell(observe(index, candidates[-1]))
    return candidates


def points(candidates: list[Candidate]) -> np.ndarray:
    return np.array([candidate.point for candidate in candidates])


def origins(candidates: list[Candidate]) -> list[str]:
    return [candidate.memo["by"] for candidate in candidates]


def nobody() -> str:
    """An address where nothing listens."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{free.getsockname()[1]}/v1"


def prose(_: str) -> str:
    return "I would raise the second number a little."


class TestLlm(ProposerContract):
    proposer_type = Llm

    @pytest.fixture(autouse=True)
    def _server(self) -> Iterator[None]:
        with ChatServer(clever) as server:
            self.options = {"url": server.url, "model": "m"}
            yield


class TestLlmThatNeverAnswersWell(ProposerContract):
    proposer_type = Llm

    @pytest.fixture(autouse=True)
    def _server(self) -> Iterator[None]:
        with ChatServer(prose) as server:
            self.options = {"url": server.url, "model": "m"}
            yield

    def test_it_is_the_search_that_stands_in(self) -> None:
        alone = CmaEs(replace(self.problem(), seed=(0, 0, 0)), CmaEsOptions())
        expected = [candidate.point for candidate in self.run(alone, 60)]
        assert [candidate.point for candidate in self.run(self.make(), 60)] == expected


# ---------------------------------------------------------------------------------------------- the search


def test_candidates_lie_around_the_means_with_a_step_size_that_falls() -> None:
    """It falls by a tenth each time that the best is still the best of the time before."""
    with ChatServer(lambda _: reply([[40, 50, 60]])) as server:
        candidates = run(make(server, sigma=0.1), 60)
    assert origins(candidates) == ["cma_es"] * NUM_STARTUP + ["llm"] * (60 - NUM_STARTUP)
    problem = Problem(dimensions=box(0.25, 3), num_objectives=1, seed=(0, 0))
    sigma, best = 0.1, -np.inf
    for index in range(NUM_STARTUP, 60):
        if (best_now := max(value_of(candidate) for candidate in candidates[:index])) <= best:
            sigma = max(sigma * DECAY, LEAST_SIGMA)
        best = best_now
        expected = np.array([0.4, 0.5, 0.6]) + sigma * problem.rng(index).standard_normal(3)
        assert candidates[index].point == pytest.approx(np.clip(expected, 0, 1))
    assert sigma == LEAST_SIGMA


def test_every_mean_of_an_answer_is_one_candidate() -> None:
    means = [[10 * k, 20, 30] for k in range(4)]
    with ChatServer(lambda _: reply(means)) as server:
        candidates = run(make(server, sigma=LEAST_SIGMA), NUM_STARTUP + 8)
        assert len(server.bodies) == 2
    expected = np.array(means + means) / 100
    assert np.abs(points(candidates[NUM_STARTUP:]) - expected).max() < 5 * LEAST_SIGMA
    assert [("reply" in candidate.memo) for candidate in candidates[NUM_STARTUP:]] == [True, False, False, False] * 2


def test_a_clever_model_finds_the_optimum_sooner_than_a_useless_one() -> None:
    def loss_after(answer: Answer, num_asks: int) -> float:
        with ChatServer(answer) as server:
            return -max(value_of(candidate) for candidate in run(make(server, num_dimensions=8), num_asks))

    loss = loss_after(clever, 80)
    assert loss < 0.1
    assert loss < 0.5 * loss_after(useless, 80)


def test_what_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_KEY", "sk-secret-of-mine")
    with ChatServer(clever) as server:
        proposer = make(server, shown=5, temperature=0.5, api_key="MY_KEY")
        candidates = run(proposer, 30)
        body, prompt = server.bodies[-1], server.prompts[-1]
    assert set(server.keys) == {"Bearer sk-secret-of-mine"}
    assert {key: body[key] for key in ("model", "temperature")} == {"model": "m", "temperature": 0.5}
    last = max(index for index, candidate in enumerate(candidates) if "prompt" in candidate.memo)
    ranked = sorted(candidates[:last], key=value_of)
    assert (shown(prompt) == np.rint(100 * points(ranked[-5:]))).all()


def test_what_failed_is_not_shown_and_what_is_pending_is() -> None:
    with ChatServer(clever) as server:
        proposer = make(server)
        asked = proposer.ask(7, [])
        for index in (6, 2, 0, 5):
            proposer.tell(observe(index, asked[index]))
        proposer.tell(Observation(index=1, point=np.array(asked[1].point), values_M=None))
        proposer.ask(1, [])
        (prompt,) = server.prompts
    assert len(shown(prompt)) == 4
    numbers = [np.rint(100 * np.array(asked[index].point)).astype(int).tolist() for index in (3, 4)]
    assert f"Merges that are being scored: {numbers[0]} {numbers[1]}\n" in prompt


def test_every_slot_gets_a_candidate_and_an_ask_is_one_question() -> None:
    with ChatServer(clever) as server:
        proposer = make(server)
        first = proposer.ask(16, [])
        generation = origins(first).count("cma_es")
        assert origins(first) == ["cma_es"] * generation + ["best"] * (16 - generation)
        assert 4 <= generation < 16
        for index, candidate in enumerate(first):
            proposer.tell(observe(index, candidate))
        second = proposer.ask(16, [])
        assert len(server.bodies) == 1
    assert origins(second)[:5] == ["llm"] * 4 + ["cma_es"]
    assert len(second) == 16
    assert len({candidate.point for candidate in first + second}) == 32


def test_more_coordinates_than_a_prompt_holds_are_asked_for_in_turn() -> None:
    with ChatServer(lambda prompt: reply([[70] * shown(prompt).shape[1]])) as server:
        proposer = make(server, num_dimensions=50, block=20, sigma=0.05)
        candidates = run(proposer, NUM_STARTUP + 9)
        prompts = server.prompts
    blocks = [range(17), range(17, 34), range(34, 50)]
    for number, prompt in enumerate(prompts):
        block = blocks[number % 3]
        assert [f"expert{d}," in prompt for d in range(50)] == [d in block for d in range(50)]
        assert f"{50 - len(block)} more numbers are not shown" in prompt
        index = NUM_STARTUP + number
        best = max(candidates[:index], key=value_of)
        moved = np.array(candidates[index].point) != np.array(best.point)
        assert set(np.flatnonzero(moved)) == set(block)


def test_results_of_earlier_stages_are_shown() -> None:
    rng = np.random.default_rng(0)
    earlier = [observe(k, Candidate(point=tuple(rng.random(3).tolist()))) for k in range(6)]
    failed = Observation(index=6, point=np.zeros(3), values_M=None)
    with ChatServer(clever) as server:
        problem = Problem(dimensions=box(0.25, 3), num_objectives=1, seed=(0, 0), history=(*earlier, failed))
        (candidate,) = Llm(problem, LlmOptions(url=server.url, model="m")).ask(1, [])
        assert len(shown(server.prompts[0])) == 6
    assert candidate.memo["by"] == "llm"


# ---------------------------------------------------------------------------------------------- bad answers


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (prose, "found no means"),
        (lambda _: "", "found no means"),
        (lambda _: reply([[1, 2]]), "list of 3 integers from 0 to 100, found [[1, 2]]"),
        (lambda _: reply([[1, 2, 101]]), "found [[1, 2, 101]]"),
        (lambda _: reply([[1, 2, -1], [True, 2, 3], [1.5, 2, 3], ["1", 2, 3]]), "found [[1, 2, -1]"),
        (lambda _: reply([]), "found []"),
        (lambda _: reply({"a": 1}), "found {"),
        (lambda _: '{"means": [[1, 2', "found no JSON after means"),
        (lambda _: '{"means": ' + "[" * 100_000, "found no JSON after means"),
        (lambda _: Raw(500, [b"out of memory"]), "HTTP 500: out of memory"),
        (lambda _: Raw(401, [b"no such key"]), "HTTP 401: no such key"),
        (lambda _: Raw(302, [], location="/v1/elsewhere"), "HTTP 302"),
        (lambda _: Raw(200, [b"<html>"]), "not JSON"),
        (lambda _: Raw(200, [b"[" * 100_000]), "not JSON"),
        (lambda _: Raw(200, [b"{}"]), "expected choices"),
        (lambda _: Raw(200, [b'{"choices": [{"message": {"content": [1]}}]}']), "expected choices"),
        (lambda _: Raw(200, [b'{"choices": [{"message": {"content": null}}]}']), "found no means"),
    ],
)
def test_a_bad_answer_is_noted_and_cma_es_stands_in(answer: Answer, reason: str) -> None:
    with ChatServer(answer) as server:
        candidates = run(make(server), NUM_STARTUP + 1)
        (prompt,) = server.prompts
    assert len(prompt) > 100
    memo = candidates[-1].memo
    assert memo["by"] == "cma_es"
    assert reason in memo["reason"]
    assert len(memo["prompt"]) == 16
    assert "means" not in memo
    assert len(memo["reason"]) < 500
    assert json.loads(json.dumps(memo)) == memo


def test_nobody_there() -> None:
    candidates = run(make(nobody()), NUM_STARTUP + 1)
    assert "refused" in candidates[-1].memo["reason"]
    assert origins(candidates) == ["cma_es"] * (NUM_STARTUP + 1)


@pytest.mark.parametrize("drips", [False, True])
def test_an_ask_takes_no_longer_than_the_time_out(drips: bool) -> None:
    """Whether nothing comes, or a byte every now and then, which keeps a socket from timing out."""

    def drop() -> Iterator[bytes]:
        while not server.closing.wait(0.05):
            yield b" "

    def answer(_: str) -> Raw:
        if not drips:
            server.closing.wait()
        return Raw(200, drop())

    with ChatServer(answer) as server:
        proposer = make(server, timeout=0.3)
        run(proposer, NUM_STARTUP)
        start = time.monotonic()
        asked = proposer.ask(8, [])
        assert 0.25 < time.monotonic() - start < 20  # the server itself would never end
    assert "timed out after 0.3 s" in asked[0].memo["reason"]
    assert len(asked) == 8


def test_after_failures_the_model_is_left_alone_for_longer_and_longer() -> None:
    with ChatServer(prose) as server:
        candidates = run(make(server), 80)
        assert len(server.bodies) == 8
    asked = [index for index, candidate in enumerate(candidates) if "prompt" in candidate.memo]
    assert np.diff(asked).tolist() == [1, 2, 4, 8, *[LONGEST_REST + 1] * 3]


def test_a_server_that_comes_back_leads_again_and_cma_es_begins_at_the_best() -> None:
    answers = iter(["?", "?", "?"] + [reply([[70, 70, 70]])] * 2 + ["?"] * 9)
    with ChatServer(lambda _: next(answers)) as server:
        candidates = run(make(server, sigma=0.02), 16)
    # Questions at 4, 5, 7 fail; those at 11 and 12 do not; that at 13 does.
    assert origins(candidates) == ["cma_es"] * 11 + ["llm"] * 2 + ["cma_es"] * 3
    assert ["prompt" in candidate.memo for candidate in candidates][10:16] == [False, True, True, True, True, False]
    off = np.abs(points(candidates) - TARGET).max(axis=1)
    assert (off[:11] > 0.3).all()
    assert (off[11:] < 0.15).all()


# ---------------------------------------------------------------------------------------------- the record


def test_a_resumed_run_takes_the_answers_from_the_record_and_not_from_the_model() -> None:
    with ChatServer(clever) as server:
        whole = run(make(server), 30)
    assert origins(whole).count("llm") == 30 - NUM_STARTUP
    with ChatServer(useless) as server:
        for cut in range(1, 30, 2):
            rebuilt = make(server)
            for index, candidate in enumerate(whole[:cut]):
                rebuilt.recall(replace(candidate, memo=json.loads(json.dumps(candidate.memo))))
                rebuilt.tell(observe(index, candidate))
            assert not server.bodies
            if "prompt" not in whole[cut].memo:
                assert rebuilt.ask(1, []) == [whole[cut]]


@pytest.mark.parametrize("answer", [clever, prose])
def test_a_replay_takes_the_answers_from_the_record_and_asks_nobody(answer: Answer) -> None:
    with ChatServer(answer) as server:
        whole = run(make(server), 30)
    again = make(nobody())
    again.answer_from(whole)
    assert run(again, 30) == whole


def test_the_key_is_nowhere(monkeypatch: pytest.MonkeyPatch) -> None:
    key = "sk-secret-of-mine"
    monkeypatch.setenv("OPENAI_API_KEY", key)
    answers: list[str | Raw] = [
        Raw(401, [f"{key} is no key".encode()]),
        f"you said {key}",
        Raw(200, [json.dumps({"odd": key}).encode()]),
        Raw(200, [f"<{key}>".encode()]),
        f'{key} {{"means": [[1, 2, 3]]}} {key}',
    ]
    for answer in answers:
        with ChatServer(lambda _, answer=answer: answer) as server:
            memo = run(make(server), NUM_STARTUP + 1)[-1].memo
            assert server.keys == [f"Bearer {key}"]
        assert key not in json.dumps(memo)
    assert memo["reply"] == '*** {"means": [[1, 2, 3]]} ***'


@pytest.mark.parametrize("key", ["sk-secret\nof-mine", "sk-secret\u2026of-mine"])
def test_a_key_that_no_header_can_hold_is_not_shown(key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", key)
    memo = run(make(nobody()), NUM_STARTUP + 1)[-1].memo
    assert "OPENAI_API_KEY: expected a key of printable characters" in memo["reason"]
    assert "sk-secret" not in json.dumps(memo)


def test_a_line_break_at_the_end_of_a_key_does_no_harm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret-of-mine\n")
    with ChatServer(clever) as server:
        assert run(make(server), NUM_STARTUP + 1)[-1].memo["by"] == "llm"
        assert server.keys == ["Bearer sk-secret-of-mine"]


@pytest.mark.parametrize("url", ["localhost/v1", "http://", "http://[::1/v1", "http://host:port/v1", "ftp://host/v1"])
def test_an_address_that_is_none(url: str) -> None:
    with pytest.raises(ValidationError, match="url"):
        LlmOptions(url=url, model="m")


@pytest.mark.parametrize("url", ["http://a b/v1", "http://./v1", "http://x\x00y/v1", "https://127.0.0.1:9"])
def test_an_address_that_leads_nowhere(url: str) -> None:
    candidate = run(make(url), NUM_STARTUP + 1)[-1]
    assert candidate.memo["by"] == "cma_es"
    assert "expected an answer" in candidate.memo["reason"]


@pytest.mark.parametrize(
    "wrong", [{"shown": 1}, {"means": 0}, {"block": 0}, {"timeout": 0.0}, {"sigma": 0.001}, {"key": "k"}]
)
def test_wrong_options(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        LlmOptions(**{"url": "http://localhost/v1", "model": "m", **wrong})


# ---------------------------------------------------------------------------------------------- the prompt


def test_the_prompt_is_the_one_that_is_documented() -> None:
    problem = Problem(
        dimensions=tuple(
            Dimension(parameter="coefficient", expert=expert, group=None, low=-0.2, high=1.2, start=0.3)
            for expert in ("maths", "chat")
        ),
        num_objectives=2,
        seed=(0, 0),
    )
    best = [
        Observation(index=0, point=np.array([0.357, 0.36]), values_M=np.array([0.512, 0.43])),
        Observation(
            index=1, point=np.array([0.44, 0.31]), values_M=np.array([0.547, 0.441]), margins_C=np.array([-0.02, 0.1])
        ),
        Observation(index=2, point=np.array([0.412, 0.33]), values_M=np.array([0.55, 0.44])),
    ]
    pending = [np.array([0.47, 0.3]), np.array([0.39, 0.4])]
    prompt = write_prompt(problem, np.arange(2), best, pending, 4)
    documented = [line.removeprefix("    ") for line in (llm_prompt.__doc__ or "").split("\n") if line[:4] == "    "]
    assert prompt.split("\n") == documented


@given(
    means=st.lists(st.lists(st.integers(0, 100), min_size=3, max_size=3), min_size=1, max_size=6, unique_by=tuple),
    before=st.text().filter(lambda text: "means" not in text),
    after=st.text().filter(lambda text: "means" not in text),
)
def test_means_are_read_among_any_words(means: list[list[int]], before: str, after: str) -> None:
    draft = reply([[0, 0, 0]])
    assert read_means(f"{draft} {before}```json\n{reply(means)}\n```{after}", 3, 4) == means[:4]


@given(st.one_of(st.text(), st.text().map(lambda text: '"means": ' + text)))
def test_any_text_is_means_or_a_data_error(text: str) -> None:
    with suppress(DataError):
        assert all(len(mean) == NUM_DIMENSIONS for mean in read_means(text, NUM_DIMENSIONS, 4))


def test_doubles_and_wrong_lists_are_left_out() -> None:
    assert read_means(reply([[1, 2], [1, 2], [3, 4], [5], [6, 700]]), 2, 4) == [[1, 2], [3, 4]]
