"""How long a login to the page lasts, how many there are, and how often one may guess."""

from __future__ import annotations

from thaw_vllm.serve.sessions import ALL, EACH, LIFETIME, MOST, WINDOW, Attempts, Sessions


def test_sessions_end_after_their_time():
    now = [0.0]
    sessions = Sessions(lambda: now[0])
    one = sessions.begin()
    now[0] = LIFETIME - 1
    assert sessions.left(one) == 1
    now[0] = LIFETIME
    assert sessions.left(one) == 0


def test_there_are_no_more_than_so_many():
    sessions = Sessions()
    made = [sessions.begin() for _ in range(MOST + 1)]
    assert len({*made}) == MOST + 1 and all(len(one) >= 43 for one in made)
    assert not sessions.left(made[0]) and all(map(sessions.left, made[1:]))


def test_logging_out():
    sessions = Sessions()
    one, other = sessions.begin(), sessions.begin()
    sessions.end(one)
    sessions.end("none")
    assert not sessions.left(one) and sessions.left(other) and not sessions.left(None)


def test_what_is_kept_is_no_cookie():
    sessions = Sessions()
    one = sessions.begin()
    assert one not in repr(vars(sessions))


def test_failed_attempts_of_one_address_and_of_all():
    now = [100.0]
    attempts = Attempts(lambda: now[0])
    for _ in range(EACH):
        assert attempts.wait("a") == 0
        attempts.note("a")
        now[0] += 1
    assert attempts.wait("a") == WINDOW - EACH and attempts.wait("b") == 0
    now[0] = 100.0 + WINDOW
    assert attempts.wait("a") == 0
    for number in range(ALL):
        attempts.note(str(number))
    assert attempts.wait("new") > 0
    now[0] += WINDOW
    assert attempts.wait("new") == 0
