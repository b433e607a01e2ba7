"""Rewards from the game itself, without a teacher: `--reward-from game` [choice].

What a decision is worth in its round follows from the payoffs, given what the others do in that state: the
partners, or in self-play the policy (without partners: what the expert would do). Every choice that the agent
did not take has an exact payoff, too, so both levels of reward are shares of the range between the worst and
the best of all its choices:

    sample level   2 U2 = 2 (u - u_worst) / (u_best - u_worst), the own payoff: what the agent gains by it
    graph level    s = (W - W_worst) / (W_best - W_worst), the welfare: what all gain by it; for efforts, too

r^S = compliance + 2 U2, and R^G = s with both bonuses, as in rewards.py. The rows are those of
decisions.py. No decision of the expert in the agent's own seat is used."""

from games import share_of_range
from rewards import Memory, Rollout, Target, group_rewards


def game_rewards(
    targets: list[Target], groups: list[list[Rollout]], memory: Memory, *, weights: dict[str, float]
) -> None:
    """As rewards.expert_rewards. target.actions: what the others do."""
    for target, group in zip(targets, groups, strict=True):
        kind, state, seat = target.kind, target.state, target.seat
        actions = [target.with_own(o.decision) if o.decision else None for o in group]
        own = [0.0 if a is None else 2 * (kind.efficiency(state, seat, a) or 0.0) for a in actions]
        common = [0.0 if a is None else share_of_range(kind.welfare_range(state, seat, a)) for a in actions]
        group_rewards(group, target, memory, weights, own, common)
