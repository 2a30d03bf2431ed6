"""What the paper claims, tested on the points of a study: paired over seeds, with 95 % intervals, in sentences.

Which way a metric is better is what the legend of metrics says, never the study. A claim holds when the whole interval lies
on its side; it needs three seeds. Each interval is for itself: of forty claims without any effect one is expected to hold.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Literal, NamedTuple

from pydantic import Field

from stages.figures.legend import HIGHER, NEITHER
from stages.figures.points import StudyPoints, is_logarithmic, meaning, quantity_name
from vtp.config import Config, Distinct
from vtp.evaluation.intervals import Interval, correlation_interval, mean_interval, slope
from vtp.texts import listed

FEWEST_SEEDS = 3
Metric = Annotated[str, Field(min_length=1, description="label among metrics, of one that has a better direction")]
Runs = Annotated[list[str], Distinct]


class BetterClaim(Config):
    """A run is better than another at the last point of both, by the mean of the paired differences."""

    name: Literal["better"]
    metric: Metric
    run: str = Field(description="the run that is better")
    than: str = Field(description="the run that it is compared with, seed by seed")


class ImprovesClaim(Config):
    """A metric improves with scale, by the mean over seeds of the least-squares slope."""

    name: Literal["improves"]
    metric: Metric
    runs: Runs = Field(min_length=1, description="one run: along its points; several: over their last points")
    against: str = Field(description="what the slope is against: flops, samples, or a label among metrics")


class FlatClaim(Config):
    """A metric stays or gets worse with scale: it improves by less than a margin."""

    name: Literal["flat_or_worse"]
    metric: Metric
    runs: Runs = Field(min_length=1, description="one run: along its points; several: over their last points")
    against: str = Field(description="what the slope is against: flops, samples, or a label among metrics")
    margin: float = Field(
        ge=0, description="improvement that still counts as none, in the metric's unit, per tenfold of FLOPs and counts"
    )


class OrderedClaim(Config):
    """Each run is better than the one before it, at the last point, by paired differences; all must hold."""

    name: Literal["ordered"]
    metric: Metric
    runs: Runs = Field(min_length=2, description="runs from the worst to the best")


class CorrelatesClaim(Config):
    """Better by one metric is better by another, by Pearson's r over all points of all runs, means over seeds."""

    name: Literal["correlates"]
    metric: Metric
    beside: Metric


Claim = Annotated[BetterClaim | ImprovesClaim | FlatClaim | OrderedClaim | CorrelatesClaim, Field(discriminator="name")]


class ClaimResult(NamedTuple):
    """A claim and what was measured of it."""

    key: str
    claim: str  # a sentence without its full stop
    estimate: Interval
    sign: float  # of an estimate as claimed
    seeds: int
    bound: float = 0.0  # what sign * estimate has to exceed
    unit: str = ""
    missing: Sequence[int] = ()  # seeds that were not measured in full

    @property
    def holds(self) -> bool | None:
        """None: that is not for so few seeds to say, or was not measured."""
        if self.seeds < FEWEST_SEEDS or math.isnan(self.estimate.low):
            return None
        return self.gain.low > self.bound

    @property
    def contradicted(self) -> bool:
        """Whether the whole interval lies on the other side."""
        return self.holds is False and self.gain.high < self.bound

    @property
    def sentence(self) -> str:
        """What may be said."""
        if math.isnan(self.estimate.estimate):
            return f"Not measured: {self.claim}{self._missing}."
        words = {True: self.claim, False: f"Not shown: {self.claim}", None: f"{self._few}, no claim: {self.claim}"}
        said = f"Contradicted: {self.claim}" if self.contradicted else words[self.holds]
        seeds = "" if self.holds is None else f", {self.seeds} seeds"
        return f"{said}: {interval(self.estimate)}{self.unit}{seeds}{self._missing}."

    @property
    def figures(self) -> dict[str, float]:
        """For the headline; what there is not is absent."""
        holds = math.nan if self.holds is None else float(self.holds)
        found = {
            "holds": holds,
            "difference": self.estimate.estimate,
            "low": self.estimate.low,
            "high": self.estimate.high,
        }
        return {name: value for name, value in found.items() if not math.isnan(value)}

    @property
    def gain(self) -> Interval:
        """The estimate, positive where it is as claimed."""
        return self.estimate if self.sign > 0 else -self.estimate

    @property
    def _few(self) -> str:
        return {1: "One seed", 2: "Two seeds"}.get(self.seeds, "Too few points")

    @property
    def _missing(self) -> str:
        if not self.missing:
            return ""
        return f"; without seed{'s' * (len(self.missing) > 1)} {listed(list(map(str, self.missing)))}, not measured in full"


def judge(claims: Sequence[Claim], measured: StudyPoints) -> list[ClaimResult]:
    """Each claim tested, in their order."""
    return [_judge(claim, measured) for claim in claims]


def _judge(claim: Claim, measured: StudyPoints) -> ClaimResult:
    match claim:
        case BetterClaim():
            return _better(claim, measured)
        case ImprovesClaim():
            return _improves(claim, measured)
        case FlatClaim():
            return _flat(claim, measured)
        case OrderedClaim():
            return _ordered(claim, measured)
        case CorrelatesClaim():
            return _correlates(claim, measured)


def conclusion(verdicts: Sequence[ClaimResult]) -> str:
    """All of them in one sentence."""
    held, tested = sum(bool(each.holds) for each in verdicts), sum(each.holds is not None for each in verdicts)
    if not tested:
        return f"Nothing is claimed: a claim needs {FEWEST_SEEDS} seeds that were measured in full."
    if held == len(verdicts):
        return f"The trend holds: {'all ' * (held > 1)}{held} claim{'s' * (held > 1)} of {len(verdicts)}."
    open_ = len(verdicts) - tested
    return f"The trend does not show: of {len(verdicts)} claims {held} hold, {tested - held} do not, {open_} are open."


def interval(of: Interval) -> str:
    """In digits that tell its ends apart: `-12.31 (-15.12 to -9.50)`."""
    if math.isnan(of.low):
        return f"{of.estimate:+.4g}"
    digits = 2 - math.floor(math.log10(width)) if (width := of.high - of.low) else 4
    estimate, low, high = (f"{round(value, digits):+.{max(digits, 0)}f}" for value in of[:3])
    return f"{estimate} ({low} to {high})"


def better_way(metric: str, metrics: Mapping[str, str]) -> str:
    """Whether higher or lower is better of a label, or neither, by the legend."""
    entry = meaning(metrics)[metric]
    return NEITHER if entry is None else entry.better


def _sign(metric: str, measured: StudyPoints) -> float:
    """1 where higher is better, -1 where lower is."""
    return 1.0 if better_way(metric, measured.metrics) == HIGHER else -1.0


def _better(claim: BetterClaim, measured: StudyPoints) -> ClaimResult:
    way = better_way(claim.metric, measured.metrics)
    words = f"{claim.run} has a {way} {claim.metric} than {claim.than} at the last point"
    key = f"{claim.metric}: {claim.run} better than {claim.than}"
    return _difference(key, words, claim.metric, (claim.run, claim.than), measured)


def _difference(key: str, words: str, metric: str, pair: tuple[str, str], measured: StudyPoints) -> ClaimResult:
    """Of the last points of two runs, seed by seed."""

    def of(seed: int) -> float:
        first, second = (measured.value(run, seed, measured.last(run), metric) for run in pair)
        return first - second

    return _over_seeds(key, words, _sign(metric, measured), of, measured.seeds(pair))


def _over_seeds(
    key: str, words: str, sign: float, of: Callable[[int], float], seeds: Sequence[int], unit: str = ""
) -> ClaimResult:
    """The mean of what `of` says of every seed, without those of which it says NaN."""
    values = {seed: of(seed) for seed in seeds}
    missing = [seed for seed, value in values.items() if math.isnan(value)]
    known = [value for value in values.values() if not math.isnan(value)]
    return ClaimResult(key, words, mean_interval(known), sign, len(known), unit=unit, missing=missing)


def _improves(claim: ImprovesClaim, measured: StudyPoints) -> ClaimResult:
    rises = better_way(claim.metric, measured.metrics) == HIGHER
    words = f"{_whose(claim)} {'rises' if rises else 'falls'} with {quantity_name(claim.against)}{_over(claim)}"
    return _slopes(f"{claim.metric}: {', '.join(claim.runs)} improves with {claim.against}", words, claim, measured)


def _flat(claim: FlatClaim, measured: StudyPoints) -> ClaimResult:
    rise = better_way(claim.metric, measured.metrics) == HIGHER
    words = (
        f"{_whose(claim)} does not {'rise' if rise else 'fall'} by {claim.margin:g} or more with "
        f"{quantity_name(claim.against)}{_over(claim)}"
    )
    key = f"{claim.metric}: {', '.join(claim.runs)} flat or worse with {claim.against}"
    found = _slopes(key, words, claim, measured)
    return found._replace(sign=-found.sign, bound=-claim.margin)


def _whose(claim: ImprovesClaim | FlatClaim) -> str:
    return f"{claim.runs[0]}'s {claim.metric}" if len(claim.runs) == 1 else claim.metric


def _over(claim: ImprovesClaim | FlatClaim) -> str:
    return "" if len(claim.runs) == 1 else f" over {', '.join(claim.runs)}"


def _slopes(key: str, words: str, claim: ImprovesClaim | FlatClaim, measured: StudyPoints) -> ClaimResult:
    """Of every seed with all points."""
    runs = claim.runs
    places = [(run, measured.last(run)) for run in runs]
    if len(runs) == 1:
        places = [(runs[0], point) for point in measured.points(runs[0])]
    logarithmic = is_logarithmic(claim.against, measured.metrics)

    def of(seed: int) -> float:
        x, y = (
            [measured.value(run, seed, point, quantity) for run, point in places]
            for quantity in (claim.against, claim.metric)
        )
        x = [math.log10(value) if value > 0 else math.nan for value in x] if logarithmic else x
        return math.nan if any(map(math.isnan, (*x, *y))) else slope(x, y)

    unit = " per tenfold" if logarithmic else f" per unit of {quantity_name(claim.against)}"
    return _over_seeds(key, words, _sign(claim.metric, measured), of, measured.seeds(runs), unit)


def _ordered(claim: OrderedClaim, measured: StudyPoints) -> ClaimResult:
    """The pair that is least clear; all hold where it does."""
    way = better_way(claim.metric, measured.metrics)
    words = f"{claim.metric} gets {way} from {' over '.join(claim.runs)}, each step at the last point"
    key = f"{claim.metric}: {', '.join(claim.runs)} ordered"
    steps = [
        _difference(key, words, claim.metric, (later, earlier), measured)._replace(unit=f" from {earlier} to {later}")
        for earlier, later in zip(claim.runs, claim.runs[1:], strict=False)
    ]
    return min(steps, key=_clarity)


def _clarity(step: ClaimResult) -> tuple[bool, float]:
    """What is not measured comes first; then by the end of the interval that is nearest to the other side."""
    gain = step.gain
    return not math.isnan(gain.estimate), gain.estimate if math.isnan(gain.low) else gain.low


def _correlates(claim: CorrelatesClaim, measured: StudyPoints) -> ClaimResult:
    pair = (claim.metric, claim.beside)
    ways = [better_way(metric, measured.metrics) for metric in pair]
    places = [(run, point) for run in measured.runs for point in measured.points(run)]
    means = [[measured.mean(run, point, metric) for metric in pair] for run, point in places]
    known = [both for both in means if all(each.number for each in both)]
    x, y = ([both[side].estimate for both in known] for side in range(2))
    return ClaimResult(
        f"{claim.metric}: correlates with {claim.beside}",
        f"{ways[0]} {claim.metric} goes with {ways[1]} {claim.beside}",
        correlation_interval(x, y),
        _sign(claim.metric, measured) * _sign(claim.beside, measured),
        min((each.number for both in known for each in both), default=0),
        unit=f" by Pearson's r over {len(known)} points, taken as independent",
    )
