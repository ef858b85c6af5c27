"""Costs made to fit: calibration by measurements, the differentiable cost, the measured host."""

import math

import _cost
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from _cost import SHAPE, quantized

from experiments import cost_validation
from jaxcompress import cost
from jaxcompress.cost import host
from jaxcompress.cost.device_model import OPS
from jaxcompress.cost.timing import probes
from jaxcompress.cost.timing.board_calibration import error_bound

pytestmark = pytest.mark.broad


@pytest.fixture(scope="module")
def predictor():
    return cost_validation.Predictor(cost_validation.by_board(cost_validation.results()))


@pytest.fixture(scope="module")
def costs():
    return cost_validation.costs_on(cost_validation.template(1))


def test_one_measurement_sets_the_speed_and_more_the_classes(costs):
    truth = {"conv": 3.0, "pointwise": 1.0, "depthwise": 8.0, "dense": 2.0, "matmul": 1.0}
    real = cost.Calibration(truth, 0)
    once = cost.calibrate([(costs["ic"], 3.0 * costs["ic"].latency_s)])
    assert once.factors == pytest.approx(dict.fromkeys(once.factors, 3.0))
    measured = [(c, real.latency_s(c)) for c in costs.values()]
    fitted = cost.calibrate(measured, ridge=1e-9)
    for c in costs.values():
        assert fitted.latency_s(c) == pytest.approx(real.latency_s(c), rel=0.01)
    # The calibrated device gives the calibrated latencies.
    device = fitted.apply(costs["ic"].device)
    again = cost_validation.costs_on(device)
    for name, c in again.items():
        assert c.latency_s == pytest.approx(fitted.latency_s(costs[name]))
    assert all("calibrated by 4" in rate.rate.source for rate in device.throughput)


def test_classes_are_found_across_boards_of_any_speed(costs):
    truth = cost.Calibration(
        {"conv": 3.0, "pointwise": 2.0, "depthwise": 8.0, "dense": 2.0, "matmul": 2.0}, 0
    )
    boards = [
        [(c, speed * truth.latency_s(c)) for c in costs.values()] for speed in (0.1, 1.0, 70.0)
    ]
    factors = cost.class_factors(boards, ridge=1e-9)
    predicted = cost.calibrate([boards[0][0]], factors=factors)
    for c, seconds in boards[0]:
        assert predicted.latency_s(c) == pytest.approx(seconds, rel=0.02)


def test_intervals_cover_what_they_say_on_boards_that_were_left_out(predictor):
    errors = predictor.errors(strict=False)
    for n in (0, 1):
        for coverage in (0.5, 0.8, 0.9):
            covered = cost_validation.coverage_of(errors[n], coverage)
            assert covered == pytest.approx(coverage, abs=0.05)
            # What the package ships is what this run gives.
            found = cost_validation.conformal([e for *_, e in errors[n]], coverage)
            assert error_bound(n, coverage) == pytest.approx(found, abs=1e-3)
    one = np.median(cost_validation.relative(e for *_, e in errors[1]))
    none = np.median(cost_validation.relative(e for *_, e in errors[0]))
    assert one <= 0.12 and none <= 0.25


def test_intervals_are_wider_for_more_coverage_and_fewer_measurements(costs):
    ic = costs["ic"]
    once = cost.calibrate([(ic, 2.0)])
    low, high = once.interval_s(costs["vww"], 0.9)
    assert low < once.latency_s(costs["vww"]) < high
    narrow = once.interval_s(costs["vww"], 0.5)
    assert low < narrow[0] and narrow[1] < high
    assert error_bound(0) > error_bound(1) > error_bound(3) == error_bound(7)
    assert math.log(high / low) == pytest.approx(2 * error_bound(1, 0.9))
    with pytest.raises(ValueError, match="coverage: must be from 0.5 to 0.95, got 1.0"):
        once.interval_s(ic, 1.0)


def test_calibration_refuses_what_it_cannot_use(costs):
    other = cost.estimate(
        _cost.dense, {"w": SHAPE((8, 4), jnp.int8)}, SHAPE((1, 8), jnp.int8), device="h100"
    )
    with pytest.raises(ValueError, match="need estimates of one device, got none"):
        cost.calibrate([])
    with pytest.raises(ValueError, match="need estimates of one device, got .*h100"):
        cost.calibrate([(costs["ic"], 1.0), (other, 1.0)])
    with pytest.raises(ValueError, match="measured seconds must be above 0, got nan"):
        cost.calibrate([(costs["ic"], float("nan"))])


def test_published_results_name_their_source():
    rows = cost_validation.results()
    assert len(rows) >= 233
    assert all(1e-5 < row.latency_s < 10 for row in rows)
    errors = cost_validation.energy_errors(rows)
    assert np.median(np.abs(errors)) <= 0.06


def network(params, x):
    return jax.nn.relu(x @ params["a"]) @ params["b"]


PARAMS = {"a": SHAPE((64, 32), jnp.float32), "b": SHAPE((32, 8), jnp.float32)}


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("device", ["stm32l4r5", "gap9", "h100"])
def test_the_differentiable_cost_is_the_estimate_at_integer_bits(device, bits):
    x = SHAPE((1, 64), jnp.float32)
    packed = {name: quantized(leaf.shape, bits) for name, leaf in PARAMS.items()}
    start = {name: quantized(leaf.shape, 8) for name, leaf in PARAMS.items()}
    soft = cost.differentiable(network, start, x, device=device, activations=8)
    got = jax.jit(lambda bits: soft(bits=bits))({"a": float(bits), "b": float(bits)})
    exact = cost.estimate(network, packed, x, device=device, activations=8)
    assert float(got.weight_bytes) == exact.weight_bytes
    assert float(got.latency_s) == pytest.approx(exact.latency_s, rel=1e-5)
    assert float(got.energy_j) == pytest.approx(exact.energy_j, rel=1e-5)


def test_the_differentiable_cost_has_gradients_that_training_can_use():
    x = SHAPE((1, 64), jnp.float32)
    start = {name: quantized(leaf.shape, 8) for name, leaf in PARAMS.items()}
    soft = cost.differentiable(network, start, x, device="gap9", activations=8)
    slopes = jax.grad(lambda bits: soft(bits=bits).latency_s)({"a": 4.5, "b": 6.5})
    assert all(float(s) >= 0 for s in slopes.values())
    whole, half = soft(kept={"a": 1.0}), soft(kept={"a": 0.5})
    assert float(half.latency_s) < float(whole.latency_s)
    kept = jax.grad(lambda k: soft(kept={"a": k}).weight_bytes)(0.5)
    exact = cost.estimate(network, start, x, device="gap9", activations=8)
    assert float(kept) == pytest.approx(exact.layers[0].weight_bytes)
    many = jax.vmap(lambda b: soft(bits={"a": b}).latency_s)(jnp.array([2.0, 4.0, 8.0]))
    assert bool((jnp.diff(many) >= 0).all())
    with pytest.raises(ValueError, match="bits: 'c' is no weight of a contraction"):
        soft(bits={"c": 4.0})


def test_the_host_is_measured_into_a_device_file(tmp_path, capsys):
    file = tmp_path / "host.toml"
    host.main([str(file), "--short", "--repeats", "1", "--watts", "15"])
    assert "wrote" in capsys.readouterr().out
    device = cost.device(file)
    assert device.active_power.value == 15 and device.fusion == "loops"
    assert {rate.op for rate in device.throughput} == set(OPS)
    got = cost.estimate(network, PARAMS, SHAPE((1, 64), jnp.float32), device=file)
    assert 0 < got.latency_s < 1 and got.energy_j == pytest.approx(15 * got.latency_s)
    with pytest.raises(SystemExit):
        host.main([str(tmp_path / "host.txt")])
    assert list(tmp_path.iterdir()) == [file]


def test_other_programs_are_timed_in_the_same_rounds():
    calls = []
    found = probes.timings(repeats=2, short=True, beside={"mine": lambda: calls.append(1)})
    assert len(calls) == 3 and set(found.beside) == {"mine"}  # once to compile, then two rounds
    assert len(found.probes) == len(found.seconds) and min(found.seconds) > 0
    with pytest.raises(ValueError, match="need repeats >= 1"):
        probes.timings(repeats=0)


def test_the_fit_finds_rates_gathering_and_overhead():
    rng = np.random.default_rng(0)
    macs, patches = rng.uniform(1e5, 1e7, 30), rng.uniform(1e4, 1e6, 30)
    inputs = rng.choice([4, 8, 12, 16], 30)
    padded = -(-inputs // 8) * 8 / inputs
    seconds = macs / 1e9 + patches * padded / np.where(inputs % 8, 2e8, 5e8) + 1e-4
    layers = list(zip(macs.tolist(), patches.tolist(), inputs.tolist(), strict=True))
    programs = [layers[i : i + 3] for i in range(0, 30, 3)]  # of three layers each
    taken = seconds.reshape(-1, 3).sum(1).tolist()
    fitted = probes.fit(programs, taken, vector=8, packet=8)
    want = (1e9, 5e8, 2e8, 1e-4)
    assert fitted[:4] == pytest.approx(want, rel=1e-6) and fitted.error < 1e-9
