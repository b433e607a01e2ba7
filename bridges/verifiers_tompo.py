"""ToMPO's games as an environment of `verifiers`, on which prime-rl trains (docs/cluster.md).

    pip install -r requirements-verifiers.txt
    export PYTHONPATH=.:bridges          # verifiers finds an environment by the name of its module
    vf-eval verifiers-tompo --env.taskset.flags "--games 20 --m 4" -n 10 --model NAME --no-push ...

`flags` are those of train_rft.py that concern games, players, prompts and rewards. There are two task sets:
1. By default a task is one decision of an expert game, as in the paper's training: the prompts of
   train_rft.py, step by step. An episode is a whole group, --m replies to the prompt, since verifiers
   compares replies only within an episode. All terms of rewards.py are metrics of a reply, r_S and R_G with
   both bonuses. Its reward is the advantage A, whose mean over the group is 0: a trainer that subtracts the
   mean reward of its own group, as prime-rl's `grpo` does, is left with A if that group is one episode.
2. With `whole_games` a task is a held-out game of eval.py, for evaluation. The policy has one seat and reads
   its own replies; each stage is a turn; a reply that is not compliant plays no links or effort 0. The
   metrics are those of play/metrics.py, and the reward is U3.

The memory belongs to the process that serves the environment. It learns of a group as soon as this is scored,
not after the step as in train_rft.py: an environment does not see the steps of its trainer.
"""

import asyncio
import shlex
import sys
from collections.abc import Iterator
from functools import cache

from eval import instances, seats_in
from games import State, game_from_json
from play.dataset import make_prompts, trained_seats
from play.expert_games import history_from_text, history_to_text
from play.metrics import per_instance
from play.players import Ask, expert_player, play_tables
from prompts import Reply, messages, parse_reply
from rewards import Memory, Sample, Target
from run.errors import InputError, refuse
from settings import RFT, Evaluation, Settings, parse_training, training_parser
from tompo import two_levels
from train_rft import advantages

try:
    import httpx
    import verifiers.v1 as vf
    from pydantic import model_validator
    from verifiers.v1.dialects.chat import message_to_wire
except ImportError as missing:
    print(f"error: {missing}; pip install -r requirements-verifiers.txt", file=sys.stderr)
    raise SystemExit(2) from None

__all__ = ["Tasks", "Tables", "Chat"]  # where verifiers looks for a task set, an environment and a harness

USED = set("seed preset eval_games reward_from weights algo steps prompts m script versions".split())


@cache
def parse(flags: str) -> Settings:
    """Raises InputError for flags that the environment cannot follow."""
    parser = training_parser("The flags of the environment.", "", RFT, Evaluation)
    parser.error = parser.print_help = lambda text="--help: see train_rft.py --help": refuse(True, text)
    settings = parse_training(parser, "bridges.verifiers_tompo", shlex.split(flags))
    groups = {a.dest for a in parser._actions if a.container.title in ("game", "players", "expert games")}
    for name, value in settings.flags.items():
        if name not in USED | groups and value != parser.get_default(name):
            raise InputError(f"the environment has no --{name.replace('_', '-')}: the trainer has its own")
    refuse(settings.flags["reward_from"] == "joint", "the environment has no --reward-from joint")
    refuse(settings.players.self_play, "the environment has no --partners self: its expert games are fixed")
    return settings


class Config(vf.TasksetConfig):
    flags: str = ""
    whole_games: bool = False

    @model_validator(mode="after")
    def check(self):
        players = parse(self.flags).players
        refuse(
            self.whole_games and players.expert.language, "whole games are compared with an exact --expert"
        )
        refuse(self.whole_games and players.think, "whole games show their thoughts: leave out --think")
        return self


class Data(vf.TaskData):
    """One decision, or a whole game from its first decision on; `prompt` is what the policy reads. history:
    what all agents did in the stages before; experts: what the experts of all do in this one, None for a
    whole game; game: its number, to which the experts' draws belong."""

    instance: dict
    history: list[str]
    seat: int
    experts: str | None
    game: int


class Task(vf.Task[Data]):
    pass


class Tasks(vf.Taskset[Task, Config]):
    """The prompts of all steps of RFT, or the held-out games."""

    def load(self) -> Iterator[Task]:
        for data in (held_out if self.config.whole_games else decisions)(parse(self.config.flags)):
            yield Task(data, self.config.task)


def decisions(settings: Settings) -> Iterator[Data]:
    rft, data, style, seed = settings.rft, settings.data, settings.players.style, settings.run.seed
    records = data.load(settings.games, settings.players)
    pool = make_prompts(None, records, trained_seats(records, data.seat, seed), rft.counts, style)
    for step in range(rft.steps):
        for q in rft.next_batch(pool, rft.counts, step, seed):
            state, experts = q.target.state, q.target.kind.to_text(q.target.actions)
            place = dict(history=history_to_text(state), seat=q.target.seat, game=q.target.game_index)
            yield Data(prompt=q.record.prompt, instance=state.game.to_json(), experts=experts, **place)


def held_out(settings: Settings) -> Iterator[Data]:
    evaluation, style = settings.evaluation, settings.players.style
    games = instances(settings.games, evaluation)
    for i, (seat,) in enumerate(seats_in(games, evaluation.seat, evaluation.seed)):
        number = [game.stages for game in games[:i]].count(games[i].stages)  # as eval.py counts them
        place = dict(history=[], seat=seat, experts=None, game=number)
        yield Data(prompt=messages(State(games[i]), seat, [], style), instance=games[i].to_json(), **place)


class Chat(vf.Harness[vf.HarnessConfig]):
    """Asks the model the question in `data`. Unlike the harness `null` of verifiers, it starts no process."""

    SUPPORTS_RESUME, EXECUTES_CODE, NEEDS_CONTAINER = True, False, False

    async def launch(self, ctx, trace, runtime, endpoint, secret, mcp_urls, data):
        body = {"model": ctx.model, "messages": [message_to_wire(message) for message in data.prompt]}
        async with httpx.AsyncClient(timeout=None, trust_env=False) as client:
            key = {"Authorization": f"Bearer {secret}"}
            (await client.post(f"{endpoint}/chat/completions", json=body, headers=key)).raise_for_status()
        return vf.ProgramResult(0, "", "")


class TablesConfig(vf.EnvConfig):
    agent: vf.AgentConfig = vf.AgentConfig(runtime=vf.SubprocessConfig())
    max_concurrent_agents: int | None = None


class Tables(vf.Env[TablesConfig]):
    """Groups, and whole games with experts in the other seats. Replies may be as long as in train_rft.py,
    unless `sampling` of the agent says otherwise."""

    def __init__(self, config: TablesConfig):
        self.settings, self.memory = parse(config.taskset.flags), Memory()
        limit = self.settings.players.style.reply_limit(self.settings.data.agents[1])
        own = config.agent.sampling.model_dump(exclude_unset=True) if config.agent.sampling else {}
        agent = config.agent.model_copy(update={"sampling": vf.SamplingConfig(**{"max_tokens": limit} | own)})
        super().__init__(config.model_copy(update={"agent": agent}))

    async def run(self, task: Task, agents: vf.Agents) -> None:
        if task.data.experts is None:
            return await self.play(task, agents.agent)
        async with asyncio.TaskGroup() as group:
            for _ in range(self.settings.rft.m):
                group.create_task(agents.agent.run(task))

    async def finalize(self, task: Task, episode: vf.Episode) -> None:
        """Rewards a group, without the replies that the server has failed to give."""
        data, cfg, traces = task.data, self.settings.rft, [trace for trace in episode.traces if trace.ok]
        if data.experts is None or not traces:
            return
        state = history_from_text(game_from_json(data.instance), data.history)
        target = Target(state, data.seat, state.kind.from_text(data.experts), data.game)
        replies = [Reply(text(trace), [], [], True) for trace in traces]
        group = [Sample(reply, parse_reply(reply.text, state, data.seat)) for reply in replies]
        cfg.reward([target], [group], self.memory)
        self.memory.update([target], [group])
        A_S, A_G = (advantages([group], name, cfg.advantage).get(0) for name in ("r_S", "R_G"))
        A = two_levels(A_S, A_G, cfg.w_sample, cfg.w_graph)
        for trace, o, a in zip(traces, group, A.tolist(), strict=True):
            trace.record_reward("A", a)
            trace.record_metrics(known(o.rewards | {"U1": o.decision is not None}))

    async def play(self, task: Task, agent: vf.Agent) -> None:
        """A whole game, in a thread that waits for the replies."""
        data, players, seed = task.data, self.settings.players, self.settings.evaluation.seed
        game, loop = game_from_json(data.instance), asyncio.get_running_loop()
        async with agent.interaction(task) as interaction:

            def policy(asks: list[Ask]) -> list[str]:
                (ask,) = asks
                chat = messages(ask.state, ask.seat, ask.replies, players.style)
                turn = interaction.turn(
                    chat[-1]["content"] if ask.replies else None
                )  # None: task.data.prompt
                if asyncio.run_coroutine_threadsafe(turn, loop).result().terminated:
                    raise InputError(f"the game has ended early: {interaction.trace.stop_condition}")
                return [text(interaction.trace)]

            others = expert_player(players.others, players.style, seed)
            table = [policy if seat == data.seat else others for seat in range(game.N)]
            given = [game], [table], [(data.seat,)], players.expert, seed
            (episode,) = await asyncio.to_thread(play_tables, *given, first=data.game)
        interaction.trace.record_metrics(measured := known(per_instance(episode)))
        interaction.trace.record_reward("U3", measured.get("U3", 0.0))


def text(trace: vf.Trace) -> str:
    """The last reply, letter for letter."""
    return trace.assistant_messages[-1].content or ""


def known(values: dict) -> dict:
    return {name: value for name, value in values.items() if value is not None}
