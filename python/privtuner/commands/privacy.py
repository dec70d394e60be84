"""The options of training with adapters in the clear at the server, and what its report says of privacy."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any, get_args

from privtuner.commands.common import say
from privtuner.errors import InputError
from privtuner.sealed.shape import Placement

if TYPE_CHECKING:
    from privtuner.sealed.owner import SealedOwner
    from privtuner.sealed.privacy import Privacy
    from privtuner.sealed.shape import Shape

__all__ = ["account", "add_privacy", "agreed", "given_privacy", "privacy_of", "within_budget"]

_NEEDED = {"noise_multiplier": "--noise-multiplier S", "clip": "--clip C", "delta": "--delta D"}


def add_privacy(parser: argparse.ArgumentParser) -> None:
    """Declare the options that say how gradients are noised for a server that reads them."""
    group = parser.add_argument_group(
        "adapters in the clear",
        "With --adapters server you trust the server to follow the protocol: it has one value a step opened, clipped "
        "and noisy, and could have your data opened in its place. The default trusts it with nothing.",
    )
    group.add_argument(
        "--adapters",
        choices=get_args(Placement),
        help="how the server of a sealed model has the adapters: encrypted under your key (default), or in the clear, "
        "as it was started",
    )
    group.add_argument(
        "--noise-multiplier",
        type=float,
        metavar="S",
        help="noise on every number of a gradient, over the clipping norm",
    )
    group.add_argument("--clip", type=float, metavar="C", help="norm that the gradient of a batch is clipped to")
    group.add_argument("--delta", type=float, metavar="D", help="of (epsilon, delta)-privacy, below one over the texts")
    group.add_argument("--epsilon-budget", type=float, metavar="E", help="end before epsilon is above this")


def given_privacy(arguments: argparse.Namespace) -> str | None:
    """Return an option of `add_privacy` that was given, as the user writes it; noise and budgets before the rest."""
    names = (*_NEEDED, "epsilon_budget", "adapters")
    return next((f"--{name.replace('_', '-')}" for name in names if getattr(arguments, name) is not None), None)


def privacy_of(arguments: argparse.Namespace) -> Privacy | None:
    """Return what the options say; None for encrypted adapters.

    Raises:
        InputError: an option is missing, out of range, or has no meaning.
        MissingPackageError: ``dp-accounting`` is not installed.
    """
    if arguments.adapters != "server":
        given = given_privacy(arguments)
        if given not in (None, "--adapters"):
            raise InputError(
                f"{given} goes with --adapters server only: nothing is opened where adapters are encrypted"
            )
        return None
    lacking = [option for name, option in _NEEDED.items() if getattr(arguments, name) is None]
    if lacking:
        raise InputError(
            f"--adapters server needs {', '.join(lacking)}: the server reads a gradient of every step, never without "
            "noise"
        )
    from privtuner.sealed.privacy import Privacy

    privacy = Privacy(arguments.noise_multiplier, arguments.clip, arguments.delta, arguments.epsilon_budget)
    privacy.epsilon(1)  # what is missing should show before anything is done
    return privacy


def agreed(shape: Shape, privacy: Privacy | None) -> None:
    """Refuse a server that has adapters where the user does not want them, and warn of one that reads gradients.

    Raises:
        InputError: user and server do not agree.
    """
    if shape.clear and privacy is None:
        raise InputError(
            "this server has the adapters in the clear, and reads a clipped, noisy gradient of every step. Give "
            "--adapters server with --noise-multiplier, --clip and --delta if you trust it to follow the protocol, or "
            "take a server whose adapters are encrypted"
        )
    if privacy is None:
        return
    if not shape.clear:
        raise InputError("--adapters server: the adapters of this server are encrypted under your key; leave it out")
    say(
        "warning: the server has the adapters in the clear and reads a noisy gradient of every step; it is trusted to "
        "have nothing else opened: a server that cheats can read your texts and labels"
    )


def within_budget(owner: SealedOwner, steps: int) -> int:
    """Return how many of so many steps, those done included, the budget pays for; say so where it is not all.

    Raises:
        InputError: it pays for none.
    """
    privacy = owner.privacy
    if privacy is None or privacy.budget is None:
        return steps
    asked = steps - owner.step
    if asked <= 0:
        return steps
    left = privacy.affordable(owner.opened + asked) - owner.opened
    if left < 1:
        raise InputError(
            f"--epsilon-budget {privacy.budget:g} pays for no step after {owner.opened}: give a larger one, or "
            "a larger --noise-multiplier"
        )
    if left < asked:
        say(f"--epsilon-budget {privacy.budget:g} pays for {owner.step + left} of {steps} steps: the run ends there")
    return owner.step + left


def account(owner: SealedOwner) -> dict[str, Any] | None:
    """Return what was spent, for the run's numbers, and say it; None for encrypted adapters."""
    from privtuner.sealed.privacy import RELATION

    privacy = owner.privacy
    if privacy is None:
        return None
    epsilon = privacy.epsilon(owner.opened)
    say(
        f"privacy towards the server: epsilon {epsilon:.3g} at delta {privacy.delta:g} after {owner.opened} opened "
        f"gradients, for {RELATION}"
    )
    return {
        "epsilon": epsilon,
        "delta": privacy.delta,
        "opened": owner.opened,
        "noise_multiplier": privacy.noise_multiplier,
        "clip": privacy.clip,
        "budget": privacy.budget,
        "relation": RELATION,
    }
