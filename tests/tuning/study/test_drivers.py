import contextlib
import threading
import time

import pytest

from raytune_emotion.errors import Breakdown
from raytune_emotion.tuning.study import database
from raytune_emotion.tuning.study.database import connect, join_address
from raytune_emotion.tuning.study.drivers import DatabaseDriver, SingleDriver, join_study


@pytest.fixture
def address(postgres):
    return join_address(postgres.new_database(), "first")


def wait_until_alone(driver):
    """The server takes a moment to see that a connection is closed."""
    deadline = time.monotonic() + 60
    while driver.others():
        assert time.monotonic() < deadline
        time.sleep(0.01)


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


def test_drivers_see_each_other_as_long_as_they_live(address):
    with join_study(address) as one:
        assert one.others() == set()
        with join_study(address) as two:
            assert (one.others(), two.others()) == ({two.own}, {one.own})
        wait_until_alone(one)


def test_trials_of_a_dead_driver_are_abandoned_after_a_while_and_those_of_a_living_one_are_not(address, clock):
    connection = connect(address.partition("#")[0])
    one = DatabaseDriver(connection, address, clock)
    with join_study(address) as two:
        drivers = {one.own, two.own, 7, None}
        assert one.abandoned(drivers) == {one.own}, "its processes may still run"
        clock.now = 19.0
        assert one.abandoned(drivers) == {one.own}
        clock.now = 21.0
        assert one.abandoned(drivers) == {one.own, 7, None}
    wait_until_alone(one)
    assert one.abandoned(drivers) == {one.own, 7, None}, "the other one has just ended"
    clock.now = 42.0
    assert one.abandoned(drivers) == drivers
    connection.close()


def test_drivers_take_turns(address):
    inside, order = threading.Event(), []
    with join_study(address) as one, join_study(address) as two:

        def wait_for_turn():
            inside.set()
            with two.turn("trials"):
                order.append("two")

        with one.turn("conclusion"), two.turn("files"), one.turn("trials"):
            pass  # they are not in each other's way
        with one.turn("trials"):
            thread = threading.Thread(target=wait_for_turn)
            thread.start()
            inside.wait(60)
            thread.join(0.2)
            order.append("one")
        thread.join(60)
    assert order == ["one", "two"]


def test_a_driver_waits_for_the_conclusion_of_others_however_long_it_takes(address, monkeypatch):
    monkeypatch.setitem(database._SERVER, "lock_timeout", "200ms")
    with join_study(address) as one, join_study(address) as two:
        with (
            one.turn("trials"),
            pytest.raises(Breakdown, match="another driver has locked"),
            two.turn("trials"),
        ):
            pass
        concluding = contextlib.ExitStack()
        concluding.enter_context(one.turn("conclusion"))
        threading.Timer(1.0, concluding.close).start()
        with two.turn("conclusion"):
            assert two.others() == {one.own}
        with (
            one.turn("trials"),
            pytest.raises(Breakdown, match="another driver has locked"),
            two.turn("trials"),
        ):
            pass


def test_turn_of_a_driver_that_dies_is_over(address):
    connection = connect(address.partition("#")[0])
    dead = DatabaseDriver(connection, address)
    with join_study(address) as other:
        with dead.turn("trials"):
            connection.close()
        with other.turn("trials"):
            wait_until_alone(other)


def test_lost_connection_is_a_sentence(postgres, address, clock):
    with join_study(address) as driver:
        driver._clock = clock
        clock.now = driver._due + 1
        assert driver.failure() == ""
        postgres.execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name LIKE 'rayt%'")
        assert driver.failure() == "", "it does not ask all the time"
        clock.now += 10
        assert "the connection was lost (" in driver.failure()
        with pytest.raises(Breakdown, match="other drivers may take over the trials of this"), driver.turn("trials"):
            pass


def test_lock_that_is_gone_while_the_connection_lasts_is_noticed(address, clock):
    """A pooler gives each question another session."""
    with join_study(address) as driver:
        driver._clock = clock
        clock.now = driver._due + 1
        driver._connection.execute("SELECT pg_advisory_unlock_all()")
        assert driver.failure().endswith("the lock of this driver is lost; connect to the server directly")


def test_only_driver_finds_all_abandoned_and_waits_for_nobody():
    assert SingleDriver().abandoned({None, 3}) == {None, 3}
    assert SingleDriver().others() == set()
    with SingleDriver().turn("trials"):
        assert SingleDriver().failure() == ""
