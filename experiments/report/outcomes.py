"""What judges say, of a target of this project and of a claim of the paper."""

from dataclasses import dataclass

from experiments.report.markdown import NOT_MEASURED


@dataclass(frozen=True)
class TargetOutcome:
    """What was measured and whether that meets the target (None: not measured)."""

    met: bool | None = None
    measured: str = NOT_MEASURED
    test_drop: str = ""  # at a size that held-out samples chose


@dataclass(frozen=True)
class ClaimOutcome:
    """A claim on one network and variant: whether it holds (None: not measured), and on what."""

    holds: bool | None
    numbers: tuple[str, ...] = ()
    tie: bool = False
