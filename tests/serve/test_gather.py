"""When a forward pass starts: proved in virtual time with a policy that takes 20 ms + 0.6 ms per observation."""

from __future__ import annotations

import asyncio
import contextlib
import random
from dataclasses import dataclass, field

import pytest
from virtual_time import SleepingDevice, numbered, run_virtually

from defi_platform.serve.inference.batcher import Batcher
from defi_platform.serve.inference.gather import GatherRule, LinearFit
from defi_platform.serve.refusals import DeadlineError


class Greedy(GatherRule):
    """Starts whatever is there at once."""

    def wait_until(self, *args: object, **kwargs: object) -> None:
        return None


@dataclass
class Load:
    """Clients in closed loop and robots that send at a fixed rate, in front of one server for `seconds`."""

    clients: int = 0
    robots: int = 0
    period_s: float = 0.1
    slack_s: float | None = None
    message_s: float = 0.0007
    """Of the one loop that decodes: what makes the last client of a group come back late."""
    seconds: float = 6.0
    device: SleepingDevice = field(default_factory=SleepingDevice)
    client_latencies: list[float] = field(default_factory=list)
    robot_latencies: list[float] = field(default_factory=list)

    def run(self, rule: GatherRule | None = None) -> Load:
        run_virtually(self._main(rule or GatherRule(64)))
        return self

    async def _main(self, rule: GatherRule) -> None:
        self._batcher = Batcher(self.device, rule, queue_size=1000, queue_wait_s=1000)
        self._decoder = asyncio.Lock()
        self._random = random.Random(0)
        await asyncio.gather(
            *(self._client(number) for number in range(self.clients)),
            *(self._robot(1000 + number) for number in range(self.robots)),
        )

    async def _client(self, number: int) -> None:
        loop = asyncio.get_running_loop()
        while (sent := loop.time()) < self.seconds:
            await asyncio.sleep(0.0005 * self._random.uniform(0.5, 1.5))
            async with self._decoder:
                await asyncio.sleep(self.message_s * self._random.uniform(0.5, 1.5))
            batched = await self._batcher.submit(numbered(number), session=number)
            assert batched.outcome.item() == number  # type: ignore[union-attr]
            if sent > 1.0:
                self.client_latencies.append(loop.time() - sent)

    async def _robot(self, number: int) -> None:
        loop = asyncio.get_running_loop()
        due = self.period_s * self._random.random()
        while due < self.seconds:
            await asyncio.sleep(max(0.0, due - loop.time()))
            sent = loop.time()
            await self._batcher.submit(numbered(number), session=number, slack_s=self.slack_s)
            if sent > 1.0:
                self.robot_latencies.append(loop.time() - sent)
            due += self.period_s

    @property
    def per_second(self) -> float:
        return len(self.client_latencies) / (self.seconds - 1.0)

    def passes_per_second(self) -> float:
        return len([start for start, _ in self.device.passes if start > 1.0]) / (self.seconds - 1.0)


def quantile(values: list[float], share: float) -> float:
    return sorted(values)[int(share * len(values))]


@pytest.mark.parametrize(
    ("clients", "least_gain", "slowest_p50_ms"), [(1, 1.0, 23), (4, 1.6, 27), (16, 1.15, 43), (64, 1.0, 80)]
)
def test_clients_in_closed_loop_form_one_group_exactly_where_that_pays(
    clients: int, least_gain: float, slowest_p50_ms: float
) -> None:
    greedy, ours = Load(clients).run(Greedy(64)), Load(clients).run()
    assert ours.per_second >= 0.99 * least_gain * greedy.per_second
    assert quantile(ours.client_latencies, 0.5) <= slowest_p50_ms / 1e3
    assert quantile(ours.client_latencies, 0.99) <= 1.02 * quantile(greedy.client_latencies, 0.99)


def test_slow_decoding_leaves_two_groups_that_take_turns() -> None:
    # 64 clients need 45 ms to be back, and a pass costs 20 ms whatever its size.
    load = Load(64).run()
    sizes = [size for start, size in load.device.passes if start > 1.0]
    assert 28 <= sum(sizes) / len(sizes) <= 36


def test_robots_in_open_loop_are_never_waited_for() -> None:
    greedy, ours = Load(robots=20, period_s=0.2).run(Greedy(64)), Load(robots=20, period_s=0.2).run()
    assert ours.robot_latencies == greedy.robot_latencies


def test_others_do_not_wait_where_waiting_saves_next_to_nothing() -> None:
    def load() -> Load:
        # A pass of all takes 180 ms, of which a group of all saves 20, and 10 until they are back.
        device = SleepingDevice(fixed_s=0.02, each_s=0.005)
        return Load(24, robots=8, period_s=0.5, message_s=0.0004, device=device)

    greedy, ours = load().run(Greedy(64)), load().run()
    assert quantile(ours.robot_latencies, 0.99) <= 1.1 * quantile(greedy.robot_latencies, 0.99)
    assert ours.per_second >= 0.97 * greedy.per_second


def test_a_client_that_leaves_delays_the_others_once_and_less_than_a_pass_costs() -> None:
    device = SleepingDevice()

    async def main() -> tuple[float, float]:
        batcher = Batcher(device, GatherRule(64), queue_size=100, queue_wait_s=100)
        loop = asyncio.get_running_loop()

        async def round_of(clients: int) -> float:
            started = loop.time()
            await asyncio.gather(*(batcher.submit(numbered(n), session=n) for n in range(clients)))
            return loop.time() - started

        for _ in range(20):
            await round_of(4)
            await asyncio.sleep(0.002)
        return await round_of(3), await round_of(3)

    waited, after = run_virtually(main())
    assert waited <= 0.0218 + 0.020
    assert after == pytest.approx(0.0218)


def test_slack_is_used_for_company_and_never_exceeded() -> None:
    hasty = Load(robots=16, period_s=0.2).run()
    patient = Load(robots=16, period_s=0.2, slack_s=0.15).run()
    assert patient.passes_per_second() < 0.5 * hasty.passes_per_second()
    assert max(patient.robot_latencies) <= 0.15


def test_a_lone_robot_with_slack_is_not_delayed() -> None:
    load = Load(robots=1, slack_s=0.09).run()
    assert max(load.robot_latencies) == pytest.approx(0.0206)


def test_a_policy_that_gains_nothing_from_batches_gets_small_ones() -> None:
    def of_cpu() -> SleepingDevice:
        return SleepingDevice(fixed_s=0.003, each_s=0.05)

    ours, greedy = Load(16, device=of_cpu()).run(), Load(16, device=of_cpu()).run(Greedy(64))
    assert max(size for start, size in ours.device.passes if start > 3.0) <= 2
    assert ours.per_second >= 0.97 * greedy.per_second


def test_a_line_is_found_and_its_slope_kept_while_only_one_size_is_seen() -> None:
    fit = LinearFit(memory=20)
    for size in [1, 4, 16] * 10:
        fit.add(size, 0.02 + 0.001 * size)
    for _ in range(500):
        fit.add(8, 0.02 + 0.001 * 8)
    assert fit.slope == pytest.approx(0.001) and fit.intercept == pytest.approx(0.02)
    for _ in range(500):
        fit.add(8, 0.03 + 0.001 * 8)  # a pass costs 10 ms more from now on
    assert fit.slope == pytest.approx(0.001) and fit.intercept == pytest.approx(0.03)


def test_deadlines_that_could_not_be_kept_for_a_while_can_be_again_once_the_device_is_quick_again() -> None:
    device, rule = SleepingDevice(), GatherRule(64)
    rule.warmed({1: 0.2})  # another program on the same device

    async def main() -> list[float]:
        batcher = Batcher(device, rule, queue_size=100, queue_wait_s=100)
        loop = asyncio.get_running_loop()
        answered = []
        while (now := loop.time()) < 30.0:
            device.fixed_s = 0.2 if now < 10.0 else 0.02
            with contextlib.suppress(DeadlineError):
                await batcher.submit(numbered(1), session=1, deadline_s=0.06)
                answered.append(loop.time())
            await asyncio.sleep(0.03)
        return answered

    answered = run_virtually(main())
    assert answered[0] > 10.0
    assert len([start for start, _ in device.passes if start < 10.0]) <= 5, (
        "one pass too late after the other"
    )
    assert len([at for at in answered if at > 15.0]) > 250


def test_a_wait_for_company_inside_the_slack_is_no_lack_of_a_device() -> None:
    async def main() -> tuple[float, float, float]:
        batcher = Batcher(SleepingDevice(fixed_s=1.0), GatherRule(1), queue_size=100, queue_wait_s=100)
        tasks = [
            asyncio.create_task(batcher.submit(numbered(n), slack_s=slack_s))
            for n, slack_s in ((0, None), (1, 5.0), (2, None))
        ]
        await asyncio.sleep(0.4)
        both = batcher.state()
        tasks[2].cancel()
        await asyncio.sleep(0)
        patient = batcher.state()
        await asyncio.gather(*tasks[:2])
        return both.late_s, patient.late_s, patient.oldest_wait_s

    assert run_virtually(main()) == pytest.approx((0.4, 0.0, 0.4))


def test_clients_that_have_left_for_good_are_looked_at_once() -> None:
    rule = GatherRule(64)
    rule.warmed({1: 0.0206, 64: 0.0584})
    for number in range(5000):
        for at in (0.0, 0.1):
            rule.arrived(number, number + at)
            rule.answered([number], number + at + 0.05)
    assert len(rule._away) == 4096
    assert rule.wait_until(6000.0, 1, since=6000.0, latest_start=6001.0, all_slack=True) is None
    assert not rule._away


def test_the_warm_up_limits_the_first_batch_where_batches_do_not_pay() -> None:
    rule = GatherRule(64)
    rule.warmed({1: 1.05, 2: 2.05})
    assert rule.best_size == 2
    rule = GatherRule(64)
    rule.warmed({size: 0.02 + 0.0006 * size for size in (1, 2, 4, 8, 16, 32, 64)})
    assert rule.best_size == 64 and rule.fixed_s == pytest.approx(0.02)
