"""Rewards from payoffs [choice]: `--reward-from game`, without a teacher, and `--reward-from welfare`.

What a decision is worth in its round follows from the payoffs, given what the others do in that state: the
partners, or in self-play the policy (without partners: what the expert would do). Every choice that the agent
did not take has an exact payoff, too, so both levels of reward are shares of the range between the worst and
the best of all its choices:

    sample level   2 U2 = 2 (u - u_worst) / (u_best - u_worst), the own payoff: what the agent gains by it
    graph level    s = (W - W_worst) / (W_best - W_worst), the welfare: what all gain by it; for efforts, too

r^S = compliance + 2 U2, and R^G = s with both bonuses, as in rewards.py. The rows are those of
decisions.py. No decision of the expert in the agent's own seat is used. A kind of decision that pays nothing
by itself has compliance alone."""

from decisions import payoffs_with_row
from games import Decision, Stakes
from rewards import Memory, Sample, Target, group_rewards


def game_rewards(
    targets: list[Target], groups: list[list[Sample]], memory: Memory, *, weights: dict[str, float]
) -> None:
    """As rewards.expert_rewards. target.actions: what the others do."""
    for target, group in zip(targets, groups, strict=True):
        kind, state, seat = target.kind, target.state, target.seat
        own: list[float] = []
        common: list[float | None] = []
        pays = kind.stakes(state, seat, target.actions) is not None  # not every kind does
        for o in group:
            actions = target.with_own(o.decision) if o.decision and pays else None
            own.append(0.0 if actions is None else 2 * share(kind.stakes(state, seat, actions)))
            common.append(0.0 if actions is None else share(kind.stakes(state, seat, actions, common=True)))
        group_rewards(group, target, memory, weights, own, common if pays else [None] * len(group))


def share(stakes: Stakes) -> float:
    """Rounding errors must not decide which of two equally good replies gets a bonus."""
    return round(stakes.share, 9)


def welfare(decision: Decision | None, target: Target) -> float | None:
    """s_i of `--reward-from welfare`, by payoffs instead of likeness: what all earn with this row among the
    experts', as a share of the most that a graph can bring. The rest is as in rewards.expert_rewards."""
    game = target.game
    if target.kind.letter != "G":
        return None
    if decision is None:
        return 0.0
    W = payoffs_with_row(target.state, target.seat, target.actions, decision.action).sum()
    _, best = game.efficient_graph(game.scored_at)
    if best <= 0:  # in a public goods game in which no link pays, a graph without loss scores 1
        return float(W >= best)
    return round(max(0.0, float(W)) / best, 9)
